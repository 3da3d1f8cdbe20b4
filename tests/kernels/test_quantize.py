"""The coding kernels against the torch definition, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from torch.library import opcheck

from foveate.attention import quantize as operators
from foveate.attention.backends.triton import kv_quant
from foveate.attention.backends.triton.kv_quant import View, kv_decode, kv_encode
from foveate.attention.quantize import dequantize, quantize
from foveate.errors import ShapeError
from foveate.methods import SingleLayer
from foveate.methods.keep.kivi import Kivi
from tests.kernels.definitions import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that the launchers ask for starts as NaN, or as -1 where it holds integers."""

    def empty(size, *, dtype, device):
        return torch.full(size, float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device)

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(kv_quant, "torch", Poisoned())


def draw(*sizes, dtype=torch.float32):
    """Numbers of all kinds: far from zero and near it, equal, zeros of both signs, one channel larger than all."""
    x = torch.randn(sizes)
    flat = x.view(-1, x.shape[-1])
    flat[::7] = flat[::7] * 100 + 3000
    flat[1::7] *= 1e-6
    flat[2::7] = flat[2::7].round()
    flat[3::7] = 3.25
    flat[4::7] = torch.where(flat[4::7] > 0, 0.0, -0.0)
    x[..., 0] = 0.7
    x[..., -1] *= 15
    return x.to(DEVICE, dtype)


def bits_of(x):
    """Bits, so that -0 and +0 differ."""
    return x if x.dtype == torch.int32 else x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    return torch.equal(bits_of(ours.contiguous()), bits_of(theirs.contiguous()))


def check(x, bits, group, dim):
    theirs = quantize(x, bits, group, dim, backend="torch")
    ours = kv_encode(x, bits=bits, group=group, dim=dim)
    for got, want in zip(ours, (theirs.code, theirs.scale, theirs.least)):
        assert same(got, want)
    back = kv_decode(*ours, bits=bits, group=group, dim=dim)
    assert same(back, dequantize(theirs, bits, group, dim, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    "bits, group, n, d",
    [(1, 32, 96, 64), (2, 32, 128, 32), (2, 1, 16, 16), (4, 64, 192, 64), (8, 4, 100, 68), (4, 128, 128, 128)],
)
def test_coding_and_back(dtype, dim, bits, group, n, d):
    check(draw(2, 2, n, d, dtype=dtype), bits, group, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bits, group, size", [(1, 16, 48), (2, 8, 40), (4, 4, 36), (8, 2, 6)])
def test_lengths_that_end_inside_words(dtype, dim, bits, group, size):
    check(draw(2, 2, *((size, 9) if dim == 2 else (9, size)), dtype=dtype), bits, group, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
def test_nan_and_infinities(dtype, dim):
    x = draw(1, 2, 64, 32, dtype=dtype)
    for row, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[0, 0, 32 * row % 64, 5 * row + 1] = number
        x[0, 1, 20 + row, 20] = number
    theirs = quantize(x, 2, 16, dim, backend="torch")
    ours = kv_encode(x, bits=2, group=16, dim=dim)
    assert torch.equal(ours[0], theirs.code)
    for got, want in zip(ours[1:], (theirs.scale, theirs.least)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    back = kv_decode(*ours, bits=2, group=16, dim=dim)
    torch.testing.assert_close(back, dequantize(theirs, 2, 16, dim, backend="torch"), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("heads, batch", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("dim", [2, 3])
def test_parts_of_buffers_are_read_where_they_lie(monkeypatch, heads, batch, dim):
    x = draw(batch, heads, 96, 32)
    whole = kv_encode(x, bits=4, group=8, dim=dim)
    numbers = kv_decode(*whole, bits=4, group=8, dim=dim)
    words, groups = (slice(4, 10), slice(4, 10)) if dim == 2 else (slice(32, 80), slice(32, 80))
    parts = whole[0][:, :, words], whole[1][:, :, groups], whole[2][:, :, groups]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied"))
    assert torch.equal(kv_decode(*parts, bits=4, group=8, dim=dim), numbers[:, :, 32:80])
    for got, want in zip(kv_encode(x[:, :, 32:80], bits=4, group=8, dim=dim), parts):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dim", [2, 3])
def test_other_strides_are_copied(dim):
    x = draw(2, 3, 64, 32)
    want = kv_encode(x, bits=2, group=16, dim=dim)
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        for got, each in zip(kv_encode(strided, bits=2, group=16, dim=dim), want):
            assert torch.equal(got, each)


def test_tiles_hold_whole_groups_and_words_and_stay_small():
    for dim in (2, 3):
        for bits in (1, 2, 4, 8):
            for group in (1, 4, 32, 128, 1024, operators.MAX_GROUP):
                for d in (64, 128, 4096):
                    if d % group and dim == 3:
                        continue
                    tile = View.of((1, 1, operators.MAX_GROUP, d), bits, group, dim).tile
                    assert tile["T"] % group == tile["T"] % (32 // bits) == 0
                    assert 2048 <= tile["T"] * tile["C"] <= 8192


@pytest.fixture
def _kernels(monkeypatch):
    monkeypatch.setattr(operators.availability, "why_not_device", lambda x: None)


@pytest.mark.usefixtures("_kernels")
def test_the_operator_takes_the_kernels_and_compiles_to_them():
    x = draw(1, 2, 64, 32)

    def there_and_back(x):
        return dequantize(quantize(x, 2, 32, 2), 2, 32, 2)

    want = dequantize(quantize(x, 2, 32, 2, backend="torch"), 2, 32, 2, backend="torch")
    assert same(there_and_back(x), want)
    assert same(torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(x), want)


@pytest.mark.parametrize("dtype, padded", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_kivi_gives_the_same_bits_by_the_kernels(monkeypatch, dtype, padded):
    method = Kivi(bits=2, value_bits=4, group=16, residual=16, piece=32)
    sizes = [60, *[1] * 6]
    q, k, v = (torch.randn(2, heads, sum(sizes), 32).to(dtype) for heads in (4, 2, 2))
    at = (torch.arange(sum(sizes))[None] - torch.tensor([[13], [0]])).clamp_min(-1)
    outputs, states = [], []
    for chosen in ("torch", "triton"):
        monkeypatch.setattr(operators, "_by_kernel", lambda *given, chosen=chosen: chosen == "triton")
        layer = SingleLayer(method)
        parts = zip(*(x.split(sizes, 2) for x in (q, k, v)), at.split(sizes, 1))
        steps = [layer(*part[:3], positions=part[3] if padded else None) for part in parts]
        outputs.append(torch.cat(steps, 2))
        states.append(layer.last.state)
    assert torch.equal(*outputs)
    for name in ("keys", "values"):
        ours, theirs = (getattr(state, name) for state in states)
        for part in ("code", "scale", "least"):
            assert same(getattr(ours, part), getattr(theirs, part))


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


def test_codes_that_do_not_fit_are_named():
    code, scale, least = kv_encode(torch.randn(1, 1, 96, 64, device=DEVICE), bits=4, group=32, dim=2)
    with pytest.raises(ShapeError, match=r"codes \[1, 1, 12, 64\] .* allowed: \[1, 1, 6, 64\]"):
        kv_decode(code, scale, least, bits=2, group=32, dim=2)
    with pytest.raises(ShapeError, match=r"leasts \[1, 1, 2, 64\]"):
        kv_decode(code, scale, least[:, :, :2], bits=4, group=32, dim=2)


INSIDE_WORDS = {
    "tokens": lambda: (torch.randn(1, 2, 24, 5, device=DEVICE), 2, 8, 2),
    "channels": lambda: (torch.randn(2, 1, 3, 24, device=DEVICE).half(), 2, 8, 3),
}


@pytest.mark.parametrize("name", INSIDE_WORDS)
def test_opchecks_of_lengths_that_end_inside_words(name):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, *options = INSIDE_WORDS[name]()
    opcheck(torch.ops.foveate.kv_encode.default, (x, *options), test_utils=tests)
    opcheck(torch.ops.foveate.kv_decode.default, (*kv_quant._kv_encode(x, *options), *options), test_utils=tests)
