"""Packed segments in any order."""

from __future__ import annotations

import torch

from foveate.attention import attend
from foveate.attention.ragged import attend_ragged


def test_segments_of_one_length_in_any_order() -> None:
    k, v = (torch.randn(40, 8, dtype=torch.float64) for _ in range(2))
    start = [30, 20, 10, 0, 0, 7, 14, 3]
    q = torch.randn(1, 16, 1, 8, dtype=torch.float64)
    o, lse = attend_ragged(q, k, v, start, [5] * 8, return_lse=True)
    for segment, begin in enumerate(start):
        heads, part = slice(2 * segment, 2 * segment + 2), slice(begin, begin + 5)
        expected, expected_lse = attend(q[:, heads], k[None, None, part], v[None, None, part], return_lse=True)
        torch.testing.assert_close(o[:, heads], expected)
        torch.testing.assert_close(lse[:, heads], expected_lse.to(lse.dtype))
