"""kv_compact moving keys to new positions, against torch's gather, unrotate and rotate."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Rope
from foveate.attention.backends.triton import kv_compact as module
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.errors import ShapeError
from tests.kernels.compiling import compiled
from tests.kernels.definitions import DEVICE, poison

B, H, N, D = 2, 2, 70, 80
# Angles of 70 positions in float32, and a rounding of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch, module)


def draw(dtype=torch.float32):
    k, v = torch.randn(B, H, N, D, device=DEVICE), torch.randn(B, H, N, 16, device=DEVICE)
    # The cache's layout: rows of one head are not neighbours.
    return k.to(dtype).transpose(1, 2).contiguous().transpose(1, 2), v.to(dtype)


def draw_index(batch=B, heads=H, count=50):
    return torch.randint(-3, N + 3, (batch, heads, count), device=DEVICE)


def want(k, v, index, pos, at, rope):
    """Through float64: the keys unrotated, gathered and rotated."""
    heads = max(index.shape[1], H)
    index = index.expand(B, heads, -1)
    valid = (index >= 0) & (index < N)
    slot = index.clamp(0, N - 1)
    at = torch.arange(N, device=DEVICE)[None] if at is None else at
    plain = rope.unrotate(k.double(), at).repeat_interleave(heads // H, 1)
    plain = plain.gather(2, slot[..., None].expand(-1, -1, -1, D))
    values = v.repeat_interleave(heads // H, 1).gather(2, slot[..., None].expand(-1, -1, -1, v.shape[3]))
    return rope.rotate(plain, pos).masked_fill(~valid[..., None], 0), values.masked_fill(~valid[..., None], 0)


def check(k, v, index, pos, at, rope):
    got, expected = kv_compact(k, v, index, pos=pos, at=at, rope=rope), want(k, v, index, pos, at, rope)
    assert got[0].dtype == k.dtype
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=8 * TOLERANCE[k.dtype])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [80, 64, 20, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_styles_widths_and_dtypes(style, dim, dtype):
    check(*draw(dtype), draw_index(), torch.arange(50, device=DEVICE)[None], None, Rope(dim, 10000.0, style))


POSITIONS = {
    "of all": lambda: torch.randint(0, 90, (1, 50), device=DEVICE),
    "of sequences": lambda: torch.randint(0, 90, (B, 50), device=DEVICE),
    "of heads": lambda: torch.randint(0, 90, (B, 6, 50), device=DEVICE).to(torch.int32),
    "of heads, strided": lambda: torch.randint(0, 90, (50, 6, 1), device=DEVICE).transpose(0, 2),
}
SLOTS = {
    "in place": lambda: None,
    "of all": lambda: torch.randint(0, 90, (1, N), device=DEVICE),
    "of heads": lambda: torch.randint(0, 90, (B, H, N), device=DEVICE),
    "of sequences": lambda: torch.randint(0, 90, (B, 1, N), device=DEVICE).to(torch.int32),
}


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("at", SLOTS)
def test_positions_of_entries_and_slots(pos, at):
    check(*draw(), draw_index(heads=6), POSITIONS[pos](), SLOTS[at](), Rope(64, 500.0))


def test_one_index_for_all_heads_and_an_index_of_int32():
    check(*draw(), draw_index(1, 1).to(torch.int32), torch.arange(50, device=DEVICE)[None], None, Rope(D))


def test_unrotated_keys_are_rotated():
    k, v = draw()
    index, ranks, rope = (
        torch.arange(50, device=DEVICE).expand(B, H, -1),
        torch.arange(50, device=DEVICE)[None],
        Rope(D),
    )
    nowhere = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    got, _ = kv_compact(k, v, index, pos=ranks, at=nowhere, rope=rope)
    torch.testing.assert_close(got, rope.rotate(k[:, :, :50], ranks), rtol=0, atol=1e-5)


def test_a_key_that_does_not_move_is_copied_exactly():
    k, v = draw()
    index = torch.randint(0, N, (B, H, 50), device=DEVICE)
    moved, _ = kv_compact(k, v, index, pos=index, rope=Rope(D))
    assert torch.equal(moved, kv_compact(k, v, index)[0])


def test_far_positions_keep_the_accuracy_of_their_difference():
    """A window far into a text, moved to its start."""
    k, v = draw()
    rope, first = Rope(D), 1_000_000
    at = torch.arange(first, first + N, device=DEVICE)[None]
    pos = torch.arange(first - 40, first + 10, device=DEVICE)[None]
    index = torch.arange(50, device=DEVICE).expand(B, H, -1)
    got, _ = kv_compact(k, v, index, pos=pos, at=at, rope=rope)
    expected, _ = want(k, v, index, pos, at, rope)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_bad_input_is_named():
    k, v = draw()
    index, pos, rope = draw_index(), torch.arange(50, device=DEVICE)[None], Rope(D)
    with pytest.raises(ShapeError, match="both or none"):
        kv_compact(k, v, index, rope=rope)
    with pytest.raises(ShapeError, match="both or none"):
        kv_compact(k, v, index, at=pos)
    with pytest.raises(ShapeError, match=r"pos \[1, 1, 49\].*allowed: int32 or int64 \[2 or 1, 2 or 1, 50\]"):
        kv_compact(k, v, index, pos=pos[:, :49], rope=rope)
    with pytest.raises(ShapeError, match="at .*float32"):
        kv_compact(k, v, index, pos=pos, at=torch.zeros(1, N, device=DEVICE), rope=rope)
    with pytest.raises(ShapeError, match="rope.dim=96 .* at most 80"):
        kv_compact(k, v, index, pos=pos, rope=Rope(96))
    with pytest.raises(ShapeError, match="torch.int32 keys"):
        kv_compact(k.to(torch.int32), v, index, pos=pos, rope=rope)
    with pytest.raises(ShapeError, match="rope.style='neox'"):
        kv_compact(k, v, index, pos=pos, rope=Rope(D, style="neox"))


# Compiled for Hopper; no GPU is needed.


@pytest.mark.parametrize("case", ["compaction, half", "compaction, interleaved", "compaction, partial"])
def test_turned_rows_fit_in_registers(case):
    (kernel,) = compiled(case, "attention_cases")
    # The table by which cosines of angles past 105615 are reduced; a spilled tile would be thousands of bytes.
    assert kernel["stack"] <= 64
    # Four thread blocks share a multiprocessor.
    assert kernel["registers"] * kernel["num_warps"] * 32 * 4 <= 65536


def test_plain_rows_spill_nothing():
    (kernel,) = compiled("compaction", "attention_cases")
    assert kernel["stack"] == 0
