"""Landmark tokens in data, vocabulary and generation, for models with `landmark` layers.

    tokens, block s -> after every s - 1 tokens of a row a landmark, so that every s-th position holds one

A landmark is never a target. Which position predicts the token after it is a choice made in the data:
    predict="token"      labels stay where they are, so that the token before a landmark predicts the token after it;
                         for tasks whose labels stand at their queries
    predict="landmark"   that label moves to the landmark; what `generate` needs, with `ForceLandmarks`

Paper: Mohtashami and Jaggi 2023 (arXiv 2305.16300). Differs from the authors' code for LLaMA without its kernel, where
landmarks are targets as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from foveate.errors import DataError, OptionError, ShapeError
from foveate.lm.data import PackedText
from foveate.lm.synthetic import IGNORED, Examples


def length_with_landmarks(length: int, block: int) -> int:
    """How many tokens `length` tokens are with their landmarks; an unfinished block has none."""
    _check_block(block)
    return length + length // (block - 1)


def insert_landmarks(tokens: Tensor, block: int, landmark: int) -> Tensor:
    """tokens [B, N] with `landmark` after every block - 1 of a row: [B, N + N // (block - 1)].

    Raises OptionError for block < 2, ShapeError for tokens of another shape.
    """
    _check_block(block)
    if tokens.dim() != 2:
        raise ShapeError(f"tokens {list(tokens.shape)}, allowed: [B, N]")
    B, N = tokens.shape
    whole = N // (block - 1) * (block - 1)
    closed = tokens[:, :whole].unflatten(1, (-1, block - 1)) if whole else tokens.new_zeros(B, 0, block - 1)
    closed = torch.cat((closed, closed.new_full((B, closed.shape[1], 1), landmark)), 2)
    return torch.cat((closed.flatten(1), tokens[:, whole:]), 1)


def remove_landmarks(tokens: Tensor, block: int) -> Tensor:
    """The inverse of `insert_landmarks`: [B, N] without every block-th token."""
    _check_block(block)
    kept = torch.arange(tokens.shape[1], device=tokens.device) % block != block - 1
    return tokens[:, kept]


def with_landmarks(
    data: Examples | PackedText, *, block: int, landmark: int, predict: str = "token"
) -> Examples | PackedText:
    """Training or test data with landmarks in it.

    Args:
        data: examples of a task, or text in blocks that are not isolated.
        block: s, as of the `landmark` layers.    landmark: the token's id, new in the vocabulary.
        predict: "token" or "landmark", see the module's docstring.
    Raises: OptionError; DataError for isolated documents, and for data that has the landmark's id in it.
    """
    if predict not in ("token", "landmark"):
        raise OptionError(f"with_landmarks: predict={predict!r}, allowed: 'token', 'landmark'")
    if isinstance(data, PackedText) and data.positions is not None:
        raise DataError(
            "with_landmarks was given isolated documents, whose blocks would not end together, allowed: text packed "
            "with isolate=False"
        )
    inputs, labels = (data.tokens, data.targets) if isinstance(data, PackedText) else (data.inputs, data.labels)
    if bool((inputs == landmark).any()):
        raise DataError(f"the data has token {landmark} in it, allowed as landmark: an id that the data never uses")
    inputs, labels = insert_landmarks(inputs, block, landmark), insert_landmarks(labels, block, IGNORED)
    if predict == "landmark":
        labels[:, block - 1 :: block] = labels[:, block - 2 : labels.shape[1] // block * block : block]
        labels[:, block - 2 : labels.shape[1] // block * block : block] = IGNORED
    if isinstance(data, PackedText):
        return replace(data, tokens=inputs, targets=labels)
    return Examples(inputs, labels)


@torch.no_grad()
def add_landmark_token(model: Any) -> int:
    """Give a model one more token, the landmark; its embedding and output row are the means of the others.

    model: a causal language model of transformers (HybridLM or another). Returns the new token's id.
    """
    landmark = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(landmark + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            weight: nn.Parameter = module.weight
            weight[landmark] = weight[:landmark].mean(0)
    return int(landmark)


class ForceLandmarks(LogitsProcessor):
    """Puts landmarks where they belong while `generate` runs, and nowhere else.

    For models trained with predict="landmark": the prompt has its landmarks in it (`insert_landmarks`), rows have no
    padding, and `remove_landmarks` takes them out of what comes back.
    """

    def __init__(self, block: int, landmark: int) -> None:
        _check_block(block)
        self.block, self.landmark = block, landmark

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [B, V] of the token after input_ids [B, N]."""
        marks = torch.zeros_like(scores, dtype=torch.bool)
        marks[:, self.landmark] = True
        due = input_ids.shape[1] % self.block == self.block - 1
        # A forced token has log-likelihood 0, so that beams stay comparable.
        return torch.where(marks, 0.0 if due else -torch.inf, -torch.inf if due else scores)


def _check_block(block: int) -> None:
    if block < 2:
        raise OptionError(f"landmarks: block={block}, allowed: >= 2 (a token and its landmark)")
