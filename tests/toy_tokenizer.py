"""A tokenizer of words for tiny models."""

from __future__ import annotations

import re
import zlib


class ToyTokenizer:
    """One token per word or mark. Words get ids as they come; when the vocabulary is full, they share them."""

    bos_token_id = 1
    eos_token_id = 2
    pad_token_id = 0
    all_special_ids = (0, 1, 2)
    chat_template = None

    def __init__(self, vocabulary: int = 128) -> None:
        self.vocabulary = vocabulary
        self.ids: dict[str, int] = {}
        self.words: dict[int, str] = {}

    def _id(self, word: str) -> int:
        if word not in self.ids:
            free = len(self.ids) + 3
            self.ids[word] = free if free < self.vocabulary else 3 + zlib.crc32(word.encode()) % (self.vocabulary - 3)
            self.words.setdefault(self.ids[word], word)
        return self.ids[word]

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self._id(word) for word in re.findall(r"\w+|\n+|[^\w\s]", text)]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words.get(each, "?") for each in ids)
