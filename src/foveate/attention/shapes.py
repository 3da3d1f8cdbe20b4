"""Shapes as text and as check: the letters of the docstrings, verified where a public operator begins."""

from __future__ import annotations

from torch import Tensor

from foveate.errors import ShapeError


def match(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Check named tensors against patterns such as `"B Hq M D"` and return the sizes of the letters.

    A letter has one size over all tensors; a number in a pattern stands for itself; `*` matches any size.
    Reads sizes, never values.
    """
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, (tensor, pattern) in tensors.items():
        letters = pattern.split()
        shown = f"{name} {list(tensor.shape)}"
        if tensor.dim() != len(letters):
            raise ShapeError(f"{shown} does not fit [{', '.join(letters)}]: it has {tensor.dim()} dimensions")
        for letter, size in zip(letters, tensor.shape):
            if letter == "*":
                continue
            if letter.isdigit():
                if size != int(letter):
                    raise ShapeError(f"{shown} does not fit [{', '.join(letters)}]: {letter} is {size} here")
            elif sizes.setdefault(letter, size) != size:
                raise ShapeError(
                    f"{shown} does not fit [{', '.join(letters)}]: {letter} is {sizes[letter]} in {first[letter]}"
                )
            first.setdefault(letter, name)
    return sizes


def match_qkv(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Check q [B, Hq, M, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], one dtype, Hq a multiple of Hkv."""
    sizes = match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"), v=(v, "B Hkv N Dv"))
    if sizes["Hkv"] == 0 or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"q has {sizes['Hq']} heads and k has {sizes['Hkv']}: Hq must be a multiple of Hkv")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    return sizes
