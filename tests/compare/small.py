"""A tiny model with a tokenizer of bytes, and tasks of few tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny

EOS = 2


def byte_tokenizer() -> Any:
    """One token per byte of text, after three special tokens."""
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_model(**options: Any) -> Any:
    return tiny("llama", **{"vocab_size": 260, "max_position_embeddings": 2048, **options})
