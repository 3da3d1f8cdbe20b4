"""Coding by groups: the torch definition number by number, its packing, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.attention import quantize as coding
from foveate.attention.quantize import Coded, dequantize, pack, quantize, unpack
from foveate.errors import BackendError, ShapeError


def number_by_number(x: Tensor, bits: int, group: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes and numbers that come back, like x [B, H, N, D] in float64, by Python's own arithmetic."""
    rows = x.movedim(dim, -1).contiguous()
    codes, back = torch.zeros_like(rows, dtype=torch.int64), torch.empty_like(rows)
    for place, numbers in enumerate(rows.view(-1, group).tolist()):
        least, scale = min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)
        for i, number in enumerate(numbers):
            code = round((number - least) / scale) if scale else 0
            codes.view(-1, group)[place, i], back.view(-1, group)[place, i] = code, code * scale + least
    return codes.movedim(-1, dim), back.movedim(-1, dim)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("group", [8, 12, 24])
def test_numbers_one_by_one(bits: int, dim: int, group: int) -> None:
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    coded = quantize(x, bits, group, dim)
    codes, back = number_by_number(x, bits, group, dim)
    assert coded.code.dtype == torch.int32
    # 24 codes of 1 bit end inside a word.
    assert coded.code.shape[dim] == math.ceil(24 * bits / 32)
    assert coded.scale.shape[dim] == coded.least.shape[dim] == 24 // group
    unpacked = unpack(coded.code, bits, dim)
    assert torch.equal(unpacked.narrow(dim, 0, 24), codes.int())
    assert not unpacked.narrow(dim, 24, unpacked.shape[dim] - 24).any()
    assert torch.equal(dequantize(coded, bits, group, dim), back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_the_nearest_to_the_stored_scales(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 64, 32).to(dtype)
    coded = quantize(x, 2, 32, 2)
    assert coded.scale.dtype == coded.least.dtype == dequantize(coded, 2, 32, 2).dtype == dtype
    scale, least = (each.float().repeat_interleave(32, 2) for each in (coded.scale, coded.least))
    levels = least + scale * torch.arange(4).view(4, 1, 1, 1, 1)
    nearest = (levels - x.float()).abs().amin(0)
    made = least + scale * unpack(coded.code, 2, 2)
    torch.testing.assert_close((made - x.float()).abs(), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_sums_are_rounded_one_by_one(dtype: torch.dtype) -> None:
    coded = quantize(torch.randn(1, 1, 64, 50).to(dtype), 8, 32, 2)
    codes = unpack(coded.code, 8, 2).double()
    scale, least = (each.double().repeat_interleave(32, 2) for each in (coded.scale, coded.least))
    # float64 holds the products and, of 16-bit numbers, the sums.
    want = ((codes * scale).float().double() + least).float().to(dtype)
    assert torch.equal(dequantize(coded, 8, 32, 2), want)


def test_words_hold_the_first_number_in_their_lowest_bits() -> None:
    code = torch.tensor([3, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3]).view(1, 1, 1, 16).int()
    word = pack(code, 2, 3)
    assert word.item() == 0b10010011 - 2**30
    assert torch.equal(unpack(word, 2, 3), code)
    assert pack(code[..., :5], 2, 3).item() == 0b10010011


def test_equal_numbers_and_zeros_of_both_signs_decode_exactly() -> None:
    x = torch.full((1, 1, 64, 16), 0.7)
    x[:, :, 32:] = torch.tensor([0.0, -0.0]).repeat(16)[:, None]
    coded = quantize(x, 2, 32, 2)
    assert not coded.scale.any()
    assert not coded.scale.signbit().any()
    assert not coded.least[:, :, 1].signbit().any()
    assert torch.equal(dequantize(coded, 2, 32, 2), x)


@pytest.mark.parametrize("bits", [1, 2])
def test_nan_stays_in_its_group(bits: int) -> None:
    x = torch.randn(1, 1, 32, 4)
    x[0, 0, 3, 1] = torch.nan
    coded = quantize(x, bits, 8, 2)
    back = dequantize(coded, bits, 8, 2)
    lost = torch.zeros_like(x, dtype=torch.bool)
    lost[0, 0, :8, 1] = True
    assert torch.equal(back.isnan(), lost)
    x[0, 0, 3, 1] = 0.0
    assert torch.equal(back[~lost], dequantize(quantize(x, bits, 8, 2), bits, 8, 2)[~lost])


@pytest.mark.parametrize("shape", [(0, 2, 32, 8), (1, 2, 0, 8)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert torch.equal(dequantize(quantize(x, 4, 8, 2), 4, 8, 2), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3"),
        ({"dim": 1}, "dim=1"),
        ({"group": 64}, "group=64 over 96 entries of dim 2"),
        ({"group": 0}, "group=0"),
    ],
)
def test_bad_input_is_named(options: dict[str, int], message: str) -> None:
    given = {"bits": 4, "group": 32, "dim": 2, **options}
    with pytest.raises(ShapeError, match=message):
        quantize(torch.randn(1, 1, 96, 64), **given)


def test_codes_that_do_not_fit_their_scales_are_refused() -> None:
    coded = quantize(torch.randn(1, 2, 32, 16), 4, 16, 2)
    with pytest.raises(ShapeError, match=r"code \[1, 2, 4, 16\] torch.int32, allowed: \[1, 2, 2, 16\] int32"):
        dequantize(coded, 2, 16, 2)
    with pytest.raises(ShapeError, match="least"):
        dequantize(Coded(coded.code, coded.scale, coded.least[:, :, :1]), 4, 16, 2)


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 1, 96, 8)
    with pytest.raises(BackendError, match="cannot run this call: q is on cpu"):
        quantize(x, 4, 32, 2, backend="triton")
    with pytest.raises(BackendError, match="backend='cuda', allowed"):
        quantize(x, 4, 32, 2, backend="cuda")
    monkeypatch.setattr(coding.availability, "why_not_device", lambda x: None)
    assert coding._by_kernel("auto", 32, x)
    assert not coding._by_kernel("torch", 32, x)
    assert "power of two up to 4096, not 24" in str(coding._why_not_triton(24, x))
    assert "float64" in str(coding._why_not_triton(32, x.double()))
    assert coding._why_not_triton(32, x.requires_grad_()) == "the kernels have no gradients"
    monkeypatch.setenv("FOVEATE_BACKEND", "torch")
    assert not coding._by_kernel("auto", 32, x.detach())


def test_scales_take_gradients() -> None:
    x = torch.randn(1, 1, 32, 4, requires_grad=True)
    dequantize(quantize(x, 4, 16, 2), 4, 16, 2).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
