"""EcoFormer's claim in small: learned hash functions keep the order of similarities better than random ones of as many
bits, and attention on their codes needs a fraction of the multiplications.

Tokens are unit vectors around random centres. Reported per number of bits: the rank correlation of agreeing bits with
similarity, the agreement of the most over the least similar pairs, and the energy of one head's attention at 3.7 pJ per
multiplication and 0.9 pJ per addition (45 nm), against softmax attention's two products.

    python benchmarks/claims/ecoformer.py [--device cuda]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from claim import record
from features import arguments
from torch import Tensor

from foveate.mixers.linear.ecoformer import binary_codes, learn_hashes, similarity_targets

MULTIPLY, ADD = 3.7e-12, 0.9e-12
TOPK = 10


def tokens(given: argparse.Namespace) -> Tensor:
    """[B, N, H, D] unit vectors around 12 centres per head."""
    generator = torch.Generator().manual_seed(0)
    B, N, H, D = 4, given.tokens, 4, given.width
    centres = torch.randn(12, H, D, generator=generator)
    which = torch.randint(12, (B, N), generator=generator)
    x = centres[which] + 0.7 * torch.randn(B, N, H, D, generator=generator)
    return torch.nn.functional.normalize(x, dim=-1).to(given.device)


def ranks(x: Tensor) -> Tensor:
    """Ranks of all numbers, ties broken at random."""
    order = torch.rand(x.numel(), generator=torch.Generator().manual_seed(0)).argsort().to(x.device)
    found = torch.empty(x.numel(), dtype=torch.float64, device=x.device)
    found[order] = x.flatten()[order].argsort(stable=True).argsort().double()
    return found


def quality(x: Tensor, codes: Tensor) -> dict[str, float]:
    agree, similar = (torch.einsum("bnhr,bmhr->bhnm", each, each) for each in (codes, x))
    target = similarity_targets(x, TOPK)
    others = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    both = torch.stack([ranks(each[:, :, others]) for each in (agree, similar)])
    return {
        "rank_correlation": float(torch.corrcoef(both)[0, 1]),
        "top_minus_bottom": float((agree[target == 1].mean() - agree[target == -1].mean()) / codes.shape[-1]),
    }


def energy(N: int, D: int, bits: int, anchors: int) -> dict[str, float]:
    """Joules of one head's attention, projections left out."""
    products = 2 * N * N * D
    hashing = N * anchors * D + N * anchors * bits
    return {
        "softmax": products * (MULTIPLY + ADD),
        "ecoformer": hashing * (MULTIPLY + ADD) + 2 * N * bits * D * ADD,
    }


def row(x: Tensor, bits: int, given: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(bits)
    anchors = x[0, torch.randperm(x.shape[1], generator=generator)[: given.anchors].to(x.device)].transpose(0, 1)
    start = torch.randn(x.shape[2], bits, given.anchors, generator=generator).to(x.device)
    target = similarity_targets(x, TOPK)
    hashes, centre, kept = learn_hashes(x, anchors, start, target, steps=given.steps, rate=0.02)
    made = {
        "bits": bits,
        "bits_improved": sum(kept),
        "random": quality(x, binary_codes(x, anchors, centre, start)),
        "learned": quality(x, binary_codes(x, anchors, centre, hashes)),
        "joules": energy(x.shape[1], x.shape[3], bits, given.anchors),
    }
    print(made, flush=True)
    return made


def main() -> None:
    started = time.perf_counter()
    given = arguments(__doc__, tokens=196, width=32, anchors=25, steps=100)
    x = tokens(given)
    rows = [row(x, bits, given) for bits in (8, 16, 32)]
    claim = "learned codes follow similarity better than random ones of as many bits"
    record("ecoformer", claim, given, started, rows=rows)


if __name__ == "__main__":
    main()
