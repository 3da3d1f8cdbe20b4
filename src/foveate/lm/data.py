"""Text for language models: files tokenised, joined with end marks, and cut into blocks of one length.

    stream = document 1, end, document 2, end, ...;  block i = stream[i L : (i + 1) L], predicting the token after each

With `isolate`, positions restart at every document, which HybridLM reads as packed sequences: nothing crosses a
document's border, and no document is asked to predict the next one's first token.

Tokenisers: "bytes" is ByT5's (UTF-8 bytes and an end mark, 259 tokens), which needs no file; anything else is a folder
or a hub name. Errors: files that are missing, not UTF-8 or too short for one block raise DataError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveate.errors import DataError
from foveate.lm.synthetic import IGNORED

MANUAL = "manual"


@dataclass(frozen=True)
class PackedText(Dataset[dict[str, Tensor]]):
    """tokens, targets: [n, L] int64. positions: [n, L], restarting at every document, or None."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {
            "input_ids": self.tokens[index],
            "labels": self.targets[index],
            "shift_labels": self.targets[index],
        }
        return item if self.positions is None else {**item, "position_ids": self.positions[index]}

    def split(self, share: float) -> tuple[PackedText, PackedText]:
        """All but the last blocks, and the last `share` of them, at least one each."""
        if len(self) < 2:
            raise DataError(
                f"{len(self)} block of text cannot be split for testing; give more text or a shorter length"
            )
        held = min(max(1, round(share * len(self))), len(self) - 1)
        return self._part(slice(0, len(self) - held)), self._part(slice(len(self) - held, len(self)))

    def in_blocks(self, length: int) -> PackedText:
        """The same tokens in blocks of another length; a last piece shorter than a block is left out."""
        blocks = self.tokens.numel() // length
        if blocks < 1:
            raise DataError(f"{self.tokens.numel()} tokens of text make no block of {length}; give more text")

        def cut(x: Tensor) -> Tensor:
            return x.flatten()[: blocks * length].view(blocks, length)

        return PackedText(cut(self.tokens), cut(self.targets), None if self.positions is None else cut(self.positions))

    def _part(self, rows: slice) -> PackedText:
        positions = None if self.positions is None else self.positions[rows]
        return PackedText(self.tokens[rows], self.targets[rows], positions)


def read_documents(paths: Sequence[str], separator: str | None = None) -> list[str]:
    """The documents of text files: a file is one, or several where `separator` stands between them.

    "manual" instead of a path is Python's own manual, each topic a document.
    """
    documents: list[str] = []
    for path in paths:
        texts = _manual() if path == MANUAL else [_read(path)]
        for text in texts:
            documents += text.split(separator) if separator else [text]
    documents = [each for each in documents if each.strip()]
    if not documents:
        raise DataError(f"there is no text in {list(paths)}; name UTF-8 text files with words, or {MANUAL!r}")
    return documents


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a UTF-8 text file") from error


def _manual() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python has no manual text (pydoc_data.topics); name a text file") from error
    return [re.sub(r"\n{3,}", "\n\n", topics[name]) for name in sorted(topics)]


def load_tokenizer(name: str = "bytes") -> Any:
    """A tokenizer by name, see the module's docstring."""
    from transformers import AutoTokenizer, ByT5Tokenizer

    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"no tokenizer could be loaded from {name!r} ({first}); name a folder or 'bytes'") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer {name!r} has no end-of-text token, which separates documents; use another")
    return tokenizer


def pack(documents: Iterable[str], tokenizer: Any, length: int, *, isolate: bool = False) -> PackedText:
    """Tokenise documents and cut them into blocks; a last piece shorter than a block is left out."""
    pieces, starts, total = [], [], 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        pieces.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        starts.append(total)
        total += pieces[-1].numel()
    blocks = (total - 1) // length
    if blocks < 1:
        raise DataError(f"{total} tokens of text make no block of {length} and a token after it; give more text")
    stream = torch.cat(pieces)
    tokens = stream[: blocks * length].view(blocks, length)
    targets = stream[1 : blocks * length + 1].view(blocks, length)
    if not isolate:
        return PackedText(tokens, targets)
    place = torch.arange(blocks * length)
    first = torch.tensor(starts)
    begin = torch.maximum(first[torch.searchsorted(first, place, right=True) - 1], place // length * length)
    positions = (place - begin).view(blocks, length)
    next_starts = torch.isin(place + 1, first).view(blocks, length)
    return PackedText(tokens, targets.masked_fill(next_starts, IGNORED), positions)
