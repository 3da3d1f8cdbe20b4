"""KIVI: codes, their packing, and the residual schedule against full-size tensors coded and decoded in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import attend
from foveate.errors import CompositionError, OptionError, ShapeError
from foveate.methods import SingleLayer, create
from foveate.methods.keep.kivi import Kivi
from foveate.methods.profile import ModelIdentity

SMALL = {"bits": 2, "group": 16, "residual": 16}


def draw(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, 4, tokens, 16), (batch, 2, tokens, 16), (batch, 2, tokens, 16))
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return q, k, v


def there_and_back(x: Tensor, bits: int, group: int, dim: int) -> Tensor:
    """Number by number."""
    x = x.movedim(dim, -1).contiguous()
    out = torch.empty_like(x)
    flat, made = x.reshape(-1, group), out.view(-1, group)
    for numbers, result in zip(flat, made):
        least, scale = numbers.min(), (numbers.max() - numbers.min()) / (2**bits - 1)
        for i, number in enumerate(numbers):
            result[i] = least if scale == 0 else least + scale * round(float((number - least) / scale))
    return out.movedim(-1, dim)


def reference(qkv: tuple[Tensor, Tensor, Tensor], sizes: list[int], method: Kivi) -> Tensor:
    q, k, v = qkv
    keys, values = k.clone(), v.clone()
    R, n, coded_keys, coded_values, out = method.residual, 0, 0, 0, []
    for M in sizes:
        out.append(attend(q[:, :, n : n + M], keys[:, :, : n + M], values[:, :, : n + M]))
        n += M
        upto = n - n % R
        if upto > coded_keys:
            part = slice(coded_keys, upto)
            keys[:, :, part] = there_and_back(k[:, :, part], method.bits, method.group, 2)
            coded_keys = upto
        if n - R > coded_values:
            part = slice(coded_values, n - R)
            values[:, :, part] = there_and_back(v[:, :, part], method.own_value_bits, method.group, 3)
            coded_values = n - R
    return torch.cat(out, 2)


def run(method: Kivi, qkv: tuple[Tensor, Tensor, Tensor], sizes: list[int]) -> tuple[Tensor, SingleLayer]:
    layer = SingleLayer(method)
    return torch.cat([layer(*part) for part in zip(*(x.split(sizes, 2) for x in qkv))], 2), layer


@pytest.mark.parametrize("sizes", [[41, *[1] * 12], [16, 1, 1], [5, *[1] * 30], [20, 30, 1, 1, 7]])
def test_steps_equal_tensors_coded_in_place(sizes: list[int]) -> None:
    qkv = draw(sum(sizes), 1)
    for options in ({"piece": 32}, {"value_bits": 4, "piece": 16}):
        method = Kivi(**{**SMALL, **options})
        out, layer = run(method, qkv, sizes)
        torch.testing.assert_close(out, reference(qkv, sizes, method), rtol=1e-6, atol=1e-6)
        assert layer.cache.stored == min(16, sum(sizes))
        assert layer.cache.seen == sum(sizes)


def test_eight_bits_are_nearly_exact_and_two_are_not() -> None:
    qkv = draw(80)
    dense, sizes = attend(*qkv), [60, *[1] * 20]
    errors = []
    for bits in (8, 4, 2):
        out, _ = run(Kivi(bits=bits, group=16, residual=16), qkv, sizes)
        errors.append(float((out - dense).norm() / dense.norm()))
    assert errors[0] < 5e-3 < errors[1] < errors[2]


def test_bytes_really_go_away() -> None:
    """2 bits and float16 scales of groups of 32: 3 bits per number, and a residual of 32 tokens."""
    k = torch.randn(1, 2, 2048, 64).half()
    layer = SingleLayer(Kivi(bits=2, group=32, residual=32))
    step = layer.step(torch.randn(1, 4, 2048, 64).half(), k, torch.randn(1, 2, 2048, 64).half())
    change = layer.method.keep(step)
    assert change is not None
    layer.cache.apply(change)
    ideal = 2 * k.numel() * 3 / 8 + 2 * 2 * 48 * 64 * 2
    assert layer.cache.bytes() < 1.05 * ideal


def test_padded_rows_equal_single_ones() -> None:
    qkv = draw(60)
    at = (torch.arange(60)[None] - torch.tensor([[13], [0]])).clamp_min(-1)
    sizes = [30, *[1] * 20, 5, *[1] * 5]
    batch, alone, start = SingleLayer(Kivi(**SMALL)), SingleLayer(Kivi(**SMALL)), 0
    for M in sizes:
        part, own = slice(start, start + M), slice(max(13, start), start + M)
        both = batch(*(x[:, :, part] for x in qkv), positions=at[:, part])
        one = alone(*(x[:1, :, own] for x in qkv))
        torch.testing.assert_close(both[:1, :, -one.shape[2] :], one, rtol=1e-6, atol=1e-7)
        start += M
    assert batch.cache.stored <= 17


def test_a_window_of_the_model_is_respected() -> None:
    qkv = draw(50, 1)
    layer = SingleLayer(Kivi(bits=8, group=16, residual=16))
    layer(*(x[:, :, :49] for x in qkv))
    step = layer.step(*(x[:, :, 49:] for x in qkv))
    step.window = 29
    expected = attend(*(x[:, :, -n:] for x, n in zip(qkv, (1, 30, 30))))
    torch.testing.assert_close(layer.method.attend(step), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"residual": 48}, "multiple of group=32"),
        ({"bits": 1, "group": 8, "residual": 24}, "32 / bits = 32"),
        ({"value_bits": 5}, "value_bits"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Kivi(**options)


def test_what_cannot_be_served() -> None:
    with pytest.raises(ShapeError, match="width 16 cannot be coded in groups of 32"):
        SingleLayer(Kivi())(*draw(4))
    with pytest.raises(CompositionError, match="Kivi"):
        create("snapkv+kivi")


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        (16, {}, r"group=32, allowed: what divides the model's head width, 16, e.g. 16"),
        (48, {"group": 32}, r"e.g. 16"),
        (16, {"group": 16, "residual": 32, "bits": 1}, r"1 bits per value number put 32 of them in a word"),
    ],
)
def test_models_whose_heads_do_not_fit_are_refused_at_once(width: int, options: dict[str, int], message: str) -> None:
    identity = ModelIdentity("toy", 2, 4, 2, width, "none")
    with pytest.raises(OptionError, match=message):
        Kivi(**options).for_model(identity)
    fitting = Kivi(group=16, residual=32)
    assert fitting.for_model(identity) is fitting
