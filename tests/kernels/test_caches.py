"""Compaction and coding of caches: against indexing, and against the eager coding of the KIVI method."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import kv_compact as compacting
from foveate.attention.backends.triton import kv_quant as coding
from foveate.attention.backends.triton.kv_compact import kv_compact
from foveate.attention.backends.triton.kv_quant import kv_decode, kv_encode
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

    for module in (compacting, coding):
        monkeypatch.setattr(module, "torch", Poisoned())


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


def scales(x, bits, group, dim):
    """Scales and leasts, from their definition."""
    grouped = x.unflatten(dim, (-1, group))
    least, most = grouped.amin(dim + 1), grouped.amax(dim + 1)
    return (most - least) / (2**bits - 1), least


def codes(x, scale, least, bits, group, dim):
    grouped = x.unflatten(dim, (-1, group)).float()
    step = torch.where(scale == 0, 1, scale).unsqueeze(dim + 1).float()
    code = ((grouped - least.unsqueeze(dim + 1).float()) / step).clamp(0, 2**bits - 1).round()
    return code.flatten(dim, dim + 1).long()


def unpacked(code, bits, dim):
    shape = [1] * (code.dim() + 1)
    shape[dim + 1] = -1
    shifts = torch.arange(0, 32, bits, device=code.device).view(shape)
    return ((code.long().unsqueeze(dim + 1) >> shifts) & (2**bits - 1)).flatten(dim, dim + 1)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits, group", [(1, 16), (2, 32), (4, 32), (4, 64), (8, 64), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_coding_equals_its_definition(dim, bits, group, dtype):
    x = torch.randn(2, 2, 192, 192, device=DEVICE).to(dtype)
    x[0, 0] = 3.25
    x[0, 1] = x[0, 1].round()
    got = kv_encode(x, bits=bits, group=group, dim=dim)
    scale, least = scales(x, bits, group, dim)
    assert torch.equal(got[2], least)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        # The interpreter cuts float32 off to bfloat16, twice here; a GPU rounds.
        assert torch.allclose(got[1].float(), scale.float(), rtol=2**-6)
        scale = got[1]
    assert torch.equal(got[1], scale)
    code = codes(x, scale, least, bits, group, dim)
    assert torch.equal(unpacked(got[0], bits, dim), code)
    back = kv_decode(*got, bits=bits, group=group, dim=dim)
    assert back.dtype == dtype
    assert torch.equal(back[0, 0], x[0, 0])
    wide = scale.float().repeat_interleave(group, dim)
    want = code * wide + least.float().repeat_interleave(group, dim)
    assert ((back.float() - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs().clamp_min(1e-3)).all()


def test_agrees_with_the_eager_coding_of_the_method():
    from foveate.methods.keep.kivi import decode, encode

    x = torch.randn(1, 2, 96, 64, device=DEVICE)
    for bits, dim in ((2, 2), (4, 3)):
        theirs = encode(x, bits, 32, dim)
        ours = kv_encode(x, bits=bits, group=32, dim=dim)
        assert torch.equal(ours[0], theirs.code)
        assert torch.allclose(kv_decode(*ours, bits=bits, group=32, dim=dim), decode(theirs, bits, 32, dim), atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 3, "group": 32, "dim": 2}, "bits=3"),
        ({"bits": 4, "group": 24, "dim": 2}, "group=24"),
        ({"bits": 4, "group": 64, "dim": 2}, "group=64 over 96"),
        ({"bits": 4, "group": 32, "dim": 1}, "dim=1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ShapeError, match=message):
        kv_encode(torch.randn(1, 1, 96, 64, device=DEVICE), **options)
