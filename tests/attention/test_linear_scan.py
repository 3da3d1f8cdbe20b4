"""linear_scan: the chunked backend against the recurrence, states, packing and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.attention.linear import head_decay, linear_scan, linear_step

FORMS = ["none", "fixed", "scalar", "vector", "delta", "fixed-delta", "scalar-delta", "vector-delta"]
B, H, HV, K, V = 2, 2, 4, 8, 6


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def case(
    form: str, T: int, *, batch: int = B, dtype=torch.float64, decay: float = 1.0, seed: int = 0, k=K, v=V
) -> dict:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    keys = torch.nn.functional.normalize(normal(batch, T, H, k), dim=-1)
    tensors = {"q": normal(batch, T, H, k), "k": keys, "v": normal(batch, T, HV, v)}
    shapes = {"fixed": (HV,), "scalar": (batch, T, HV), "vector": (batch, T, HV, k)}
    kind = form.removesuffix("-delta")
    if kind in shapes:
        tensors["g"] = -decay * torch.rand(shapes[kind], generator=gen, dtype=torch.float64)
    if form.endswith("delta"):
        tensors["beta"] = torch.rand(batch, T, HV, generator=gen, dtype=torch.float64)
    return {name: each.to(dtype) for name, each in tensors.items()}


def start(rows: int, dtype=torch.float64, k=K, v=V) -> Tensor:
    return torch.randn(rows, HV, k, v, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def part(tensors: dict, tokens: slice) -> dict:
    return {name: x[:, tokens] if x.dim() > 1 else x for name, x in tensors.items()}


def reference(tensors: dict, **options):
    return linear_scan(**tensors, backend="reference", output_final_state=True, **options)


def chunked(tensors: dict, **options):
    return linear_scan(**tensors, backend="torch", output_final_state=True, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_are_the_recurrence(form, chunk_size, with_state):
    tensors = case(form, 71)
    S0 = start(B) if with_state else None
    o, S = chunked(tensors, chunk_size=chunk_size, initial_state=S0)
    expected, final = reference(tensors, initial_state=S0)
    assert relative(o, expected) < 1e-12
    assert relative(S, final) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3, 15, 63, 65, 127, 1000])
def test_float32_at_odd_lengths(form, T):
    tensors = case(form, T, batch=1, dtype=torch.float32)
    expected, final = reference({name: x.double() for name, x in tensors.items()})
    o, S = chunked(tensors)
    assert o.dtype == S.dtype == torch.float32
    assert relative(o, expected) < 1e-5
    assert relative(S, final) < 1e-5


@pytest.mark.parametrize("k", [32, 80, 256])
@pytest.mark.parametrize("form", ["scalar", "vector", "scalar-delta"])
def test_float32_at_head_dimensions(form, k):
    tensors = case(form, 70, batch=1, dtype=torch.float32, k=k, v=k)
    expected, _ = reference({name: x.double() for name, x in tensors.items()})
    assert relative(chunked(tensors)[0], expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(form, dtype):
    tensors = case(form, 40, dtype=dtype)
    expected, final = reference({name: x.double() for name, x in tensors.items()})
    o, S = chunked(tensors)
    assert o.dtype == dtype
    assert S.dtype == torch.float32
    assert relative(o, expected) < 5e-3
    assert relative(S, final) < 1e-4


@pytest.mark.parametrize("form", ["fixed", "scalar", "vector", "scalar-delta", "vector-delta"])
@pytest.mark.parametrize("decay", [1e-6, 20.0, 200.0])
def test_extreme_decays(form, decay):
    """Strong and weak decays in one chunk: neither overflow nor loss of the weak ones after the strong."""
    tensors = case(form, 100, dtype=torch.float32, decay=decay)
    if tensors["g"].dim() > 1:
        tensors["g"][:, 1::2] *= 1e-3
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    double = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    o, expected = chunked(tensors)[0], reference(double)[0]
    assert relative(o, expected) < 1e-5
    o.sum().backward()
    expected.sum().backward()
    for name, x in tensors.items():
        assert x.grad.isfinite().all(), name
        floor = 1e-6 * double["v"].grad.norm()
        assert (x.grad - double[name].grad).norm() < 1e-4 * double[name].grad.norm() + floor, name


@pytest.mark.parametrize("form", ["fixed", "scalar", "vector", "scalar-delta", "vector-delta"])
def test_minus_infinity_wipes_the_state(form):
    tensors = case(form, 40)
    t = 21
    if form == "fixed":
        tensors["g"][1] = -torch.inf
    else:
        tensors["g"][:, t] = -torch.inf
    o, S = chunked(tensors, initial_state=start(B))
    expected, final = reference(tensors, initial_state=start(B))
    assert relative(o, expected) < 1e-12
    assert relative(S, final) < 1e-12
    if form != "fixed":
        fresh, _ = chunked(part(tensors, slice(t, None)))
        assert relative(o[:, t:], fresh) < 1e-12
    found = []
    for run in (chunked, reference):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
        found.append(torch.autograd.grad(run(leaves, initial_state=start(B))[0].sum(), list(leaves.values())))
    for name, a, b in zip(tensors, *found):
        assert torch.allclose(a, b, atol=1e-10), name


@pytest.mark.parametrize("form", FORMS)
def test_gradients_in_float64(form):
    tensors = {name: x.requires_grad_() for name, x in case(form, 7, batch=1, k=3, v=2).items()}
    S0 = start(1, k=3, v=2).requires_grad_()
    names = list(tensors)

    def run(S, *values):
        return linear_scan(
            **dict(zip(names, values)), initial_state=S, output_final_state=True, chunk_size=4, backend="torch"
        )

    assert torch.autograd.gradcheck(run, (S0, *tensors.values()))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_recurrence(form):
    inputs = {name: x.requires_grad_() for name, x in case(form, 45).items()}
    S0 = start(B).requires_grad_()
    found = []
    for run in (chunked, reference):
        o, S = run(inputs, initial_state=S0)
        loss = (o * o.detach().cos()).sum() + (S * S.detach().sin()).sum()
        found.append(torch.autograd.grad(loss, [S0, *inputs.values()]))
    for name, a, b in zip(["state", *inputs], *found):
        assert relative(a, b) < 1e-10, name


@settings(deadline=None, max_examples=25)
@given(
    form=st.sampled_from(FORMS),
    T=st.integers(2, 50),
    cut=st.integers(1, 49),
    chunk_size=st.sampled_from([1, 4, 16]),
    normalize=st.booleans(),
)
def test_any_split_agrees(form, T, cut, chunk_size, normalize):
    cut = min(cut, T - 1)
    normalize = normalize and not form.endswith("delta")
    options = {"chunk_size": chunk_size, "normalize": normalize}
    tensors = case(form, T)
    if normalize:
        tensors["q"], tensors["k"] = tensors["q"].abs(), tensors["k"].abs()
    o, S = chunked(tensors, **options)
    first, middle = chunked(part(tensors, slice(0, cut)), **options)
    second, last = chunked(part(tensors, slice(cut, None)), initial_state=middle, **options)
    assert relative(torch.cat([first, second], 1), o) < 1e-11
    assert relative(last, S) < 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_steps_are_the_scan(form, backend):
    tensors = case(form, 9)
    o, S = reference(tensors)
    state, outputs = None, []
    for t in range(9):
        one, state = linear_step(**part(tensors, slice(t, t + 1)), state=state, backend=backend)
        outputs.append(one)
    assert relative(torch.cat(outputs, 1), o) < 1e-12
    assert relative(state, S) < 1e-12


@settings(deadline=None, max_examples=25)
@given(
    form=st.sampled_from(FORMS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    chunk_size=st.sampled_from([1, 8, 64]),
)
def test_packed_is_a_loop(form, lengths, chunk_size):
    T = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors, S0 = case(form, T, batch=1), start(len(lengths))
    o, S = chunked(tensors, cu_seqlens=bounds, initial_state=S0, chunk_size=chunk_size)
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(S[n], S0[n])
            continue
        tokens = slice(int(bounds[n]), int(bounds[n + 1]))
        expected, final = reference(part(tensors, tokens), initial_state=S0[n : n + 1])
        assert relative(o[:, tokens], expected) < 1e-11
        assert relative(S[n : n + 1], final) < 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_stays_in_its_sequence(form, backend):
    tensors = case(form, 60, batch=1)
    clean = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    for name, x in tensors.items():
        if name != "g" or x.dim() > 1:
            x[:, 20:35] = torch.nan
    dirty = {name: x.requires_grad_() for name, x in tensors.items()}
    options = {"cu_seqlens": torch.tensor([0, 20, 35, 60]), "output_final_state": True, "backend": backend}
    good = torch.tensor([*range(20), *range(35, 60)])
    o, S = linear_scan(**dirty, **options)
    expected, final = linear_scan(**clean, **options)
    assert torch.equal(o[:, good], expected[:, good])
    assert torch.equal(S[[0, 2]], final[[0, 2]])
    o[:, good].sum().backward()
    expected[:, good].sum().backward()
    for name in ("q", "k", "v"):
        assert torch.allclose(dirty[name].grad[:, good], clean[name].grad[:, good]), name


def test_decay_forms_contain_each_other():
    T = 50
    plain, fixed = case("none", T), case("fixed", T)
    g = fixed["g"]
    as_scalar = {**fixed, "g": g.expand(B, T, HV)}
    as_vector = {**fixed, "g": g[:, None].expand(B, T, HV, K)}
    expected, _ = chunked(fixed)
    assert relative(chunked(as_scalar)[0], expected) < 1e-13
    assert relative(chunked(as_vector)[0], expected) < 1e-13
    assert relative(chunked({**plain, "g": torch.zeros(HV, dtype=torch.float64)})[0], chunked(plain)[0]) < 1e-13
    delta = case("delta", T)
    zero = torch.zeros(B, T, HV, dtype=torch.float64)
    assert relative(chunked({**delta, "g": zero})[0], chunked(delta)[0]) < 1e-12


def test_no_decay_is_the_masked_product():
    T = 40
    tensors = case("none", T)
    q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
    q, k = (x.repeat_interleave(HV // H, 1) for x in (q, k))
    expected = ((q @ k.transpose(-1, -2)).tril() @ v) * K**-0.5
    assert relative(chunked(tensors, chunk_size=16)[0], expected.transpose(1, 2)) < 1e-12


def test_normalised_weights_sum_to_one():
    tensors = case("scalar", 30)
    tensors["q"], tensors["k"] = tensors["q"].abs(), tensors["k"].abs()
    tensors["v"] = torch.ones_like(tensors["v"])
    o, S = chunked(tensors, normalize=True, chunk_size=8)
    assert torch.allclose(o, torch.ones_like(o), atol=1e-8)
    assert S.shape == (B, HV, K, V + 1)
    expected, final = reference(tensors, normalize=True)
    assert relative(o, expected) < 1e-12
    assert relative(S, final) < 1e-12


def test_delta_rule_stores_orthonormal_keys_and_overwrites():
    gen = torch.Generator().manual_seed(1)
    keys = torch.linalg.qr(torch.randn(K, K, generator=gen, dtype=torch.float64))[0][None, :, None]
    v = torch.randn(1, K, 1, V, generator=gen, dtype=torch.float64)
    ones = torch.ones(1, K, 1, dtype=torch.float64)
    _, S = linear_scan(keys, keys, v, beta=ones, output_final_state=True, chunk_size=4)
    assert torch.allclose(keys[0, :, 0] @ S[0, 0], v[0, :, 0], atol=1e-12)
    same = keys[:, :1].expand(1, K, 1, K)
    _, S = linear_scan(same, same, v, beta=ones, output_final_state=True, chunk_size=4)
    assert torch.allclose(same[0, 0, 0] @ S[0, 0], v[0, -1, 0], atol=1e-12)
    before = torch.randn(1, 1, K, V, generator=gen, dtype=torch.float64)
    _, S = linear_scan(keys, keys, v, beta=0 * ones, initial_state=before, output_final_state=True)
    assert torch.equal(S, before)


def test_scale_and_l2norm_act_on_the_right_side():
    tensors = case("scalar", 20)
    tensors["k"] = tensors["k"] * 3
    o, S = chunked(tensors, scale=1.0)
    doubled, same = chunked(tensors, scale=2.0)
    assert relative(doubled, 2 * o) < 1e-14
    assert torch.equal(S, same)
    unit = {n: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if n in "qk" else x for n, x in tensors.items()}
    assert relative(chunked(tensors, qk_l2norm=True)[0], chunked(unit)[0]) < 1e-13


def test_the_future_changes_nothing():
    tensors = case("vector-delta", 50)
    o, _ = chunked(tensors, chunk_size=16)
    for name, x in tensors.items():
        tensors[name] = torch.cat([x[:, :30], x[:, 30:] * 0.5], 1)
    assert torch.equal(chunked(tensors, chunk_size=16)[0][:, :30], o[:, :30])


def test_strided_inputs_and_autocast():
    tensors = case("scalar-delta", 33, dtype=torch.float32)
    expected, _ = chunked(tensors)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in tensors.items()}
    assert relative(chunked(strided)[0], expected) < 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chunked(tensors)[0], expected)


def test_head_decay_schemes():
    assert torch.allclose(head_decay(8), -(0.5 ** torch.arange(1.0, 9.0)))
    # ALiBi's rule for 3 heads: the two slopes of 2 heads, then the first of 4.
    assert torch.allclose(head_decay(3), -torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert torch.allclose(head_decay(2, layer=3, layers=4), -torch.tensor([2.0**-4, 2.0**-8]) * 1e-5, rtol=1e-3)
    assert head_decay(4, "lightning", layer=0, layers=6).tolist() == [0, -2, -4, -6]
    assert torch.allclose(head_decay(2, "retnet").exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64]))


def test_compiles_whole():
    tensors = case("scalar-delta", 20, dtype=torch.float32)
    run = torch.compile(lambda **x: linear_scan(**x, chunk_size=8)[0], backend="eager", fullgraph=True)
    assert relative(run(**tensors), chunked(tensors, chunk_size=8)[0]) < 1e-6
