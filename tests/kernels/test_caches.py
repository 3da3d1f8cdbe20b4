"""Compaction of caches against indexing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import kv_compact as compacting
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.errors import ShapeError
from tests.kernels.definitions import DEVICE


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that the launchers ask for starts as NaN, or as -1 where it holds integers."""

    def empty(*size, dtype, **options):
        shape = size[0] if isinstance(size[0], tuple | list) else size
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype, **options)

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(compacting, "torch", Poisoned())


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_compaction_equals_indexing(heads, batch, dtype):
    k, v = torch.randn(3, 2, 70, 80, device=DEVICE).mul(9).to(dtype), torch.randn(3, 2, 70, 16, device=DEVICE).to(dtype)
    index = torch.randint(-3, 73, (batch, heads, 300), device=DEVICE)
    got = kv_compact(k.transpose(0, 1).contiguous().transpose(0, 1), v, index)
    heads = max(heads, 2)
    for x, ours in zip((k, v), got):
        whole = index.expand(3, heads, -1)
        valid = (whole >= 0) & (whole < 70)
        where = whole.clamp(0, 69)[..., None].expand(-1, -1, -1, x.shape[3])
        want = x.repeat_interleave(heads // 2, 1).gather(2, where)
        assert torch.equal(ours, want.masked_fill(~valid[..., None], 0))


def test_compaction_of_nothing_and_bad_input():
    k = torch.randn(1, 2, 5, 16, device=DEVICE)
    assert kv_compact(k, k, torch.zeros(1, 2, 0, dtype=torch.int32, device=DEVICE))[0].shape == (1, 2, 0, 16)
    with pytest.raises(ShapeError, match="does not fit k"):
        kv_compact(k, k, torch.zeros(1, 3, 4, dtype=torch.int32, device=DEVICE))
