"""Drive one layer through a prompt and single steps, and compare it with dense attention under a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.methods import SingleLayer
from foveate.methods.single import masked_reference


def random_qkv(B: int = 2, Hq: int = 4, Hkv: int = 2, N: int = 40, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Float64, so that brute force and method agree on every choice."""
    shapes = ((B, Hq, N, D), (B, Hkv, N, D), (B, Hkv, N, D))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q * 2, k, v


def kept(layer: SingleLayer, row: int = 0, head: int = 0) -> list[int]:
    return layer.cache.kept_positions(row, head).tolist()


def held_mask(layer: SingleLayer, N: int) -> Tensor:
    """Bool [B, Hkv, N]: positions held now."""
    B, H = layer.cache.shape
    mask = torch.zeros(B, H, N, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            mask[b, h, layer.cache.kept_positions(b, h)] = True
    return mask


def check_steps_equal_masked_dense(layer: SingleLayer, qkv: tuple[Tensor, Tensor, Tensor], prompt: int) -> None:
    """After the prompt, every step must equal dense attention over what was held before it, and its own key."""
    q, k, v = qkv
    layer(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    for t in range(prompt, q.shape[2]):
        mask = held_mask(layer, t + 1)
        mask[..., t] = True
        one = slice(t, t + 1)
        out = layer(q[:, :, one], k[:, :, one], v[:, :, one])
        expected = masked_reference(q[:, :, one], k[:, :, : t + 1], v[:, :, : t + 1], mask)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def check_padded_rows_equal_singles(make, qkv: tuple[Tensor, Tensor, Tensor], prompt: int, pads: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Left-padded rows hold and give what each row does alone."""
    q, k, v = qkv
    positions = torch.arange(q.shape[2])[None] - torch.tensor(pads)[:, None]
    positions = positions.clamp_min(-1)
    spans = [slice(0, prompt), *[slice(t, t + 1) for t in range(prompt, q.shape[2])]]
    batch, singles = make(), [make() for _ in pads]
    for span in spans:
        out = batch(q[:, :, span], k[:, :, span], v[:, :, span], positions=positions[:, span])
        for row, pad in enumerate(pads):
            own = slice(pad, span.stop) if span.start == 0 else span
            alone = singles[row](*(x[row : row + 1, :, own] for x in (q, k, v)))
            torch.testing.assert_close(out[row : row + 1, :, -alone.shape[2] :], alone, rtol=1e-6, atol=1e-6)
            for head in range(k.shape[1]):
                assert kept(batch, row, head) == kept(singles[row], 0, head)
