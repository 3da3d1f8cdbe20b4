"""TransNormerLLM's mixer against its masked quadratic form, LRPE, and decoding far beyond where decays underflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.transnormerllm import SGLU, lrpe, simple_norm

DIM, HEADS, D = 16, 2, 8


def made(**options):
    torch.manual_seed(0)
    return create_mixer("transnormerllm", dim=DIM, heads=HEADS, **options).double().eval()


def tokens(length: int = 11, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def distances(length: int) -> Tensor:
    at = torch.arange(length)
    return (at[:, None] - at).double()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_the_layer_is_its_decayed_matrix(layer):
    mixer, x = made(layer=layer, layers=4), tokens()
    q, k, v, u = mixer.qkvu_proj(x).chunk(4, -1)
    q, k, v = heads_of(F.silu(q)), heads_of(F.silu(k)), heads_of(v)
    apart = distances(11)
    scores = q @ k.transpose(-1, -2)
    if layer == 0:
        cosine = (mixer.theta[:, None, None] * apart[..., None]).cos()
        scores = torch.einsum("bhsd,bhtd,hstd->bhst", q, k, cosine)
    slopes = torch.tensor([2**-4, 2**-8]).double() * (1 - layer / 3 + 1e-5)
    weights = (torch.exp(-slopes[:, None, None] * apart.clamp(min=0)) * scores).tril()
    o = (weights @ v).transpose(1, 2).flatten(2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o * u), atol=1e-6)


def test_lrpe_is_the_sum_of_cosines_of_the_distance_and_no_more():
    q, k, theta = torch.randn(3, 1, 1, HEADS, D, generator=torch.Generator().manual_seed(0)).double()
    theta = theta[0, 0]

    def scores(i: int, j: int) -> Tensor:
        return (lrpe(q, theta, torch.tensor([[i]])) * lrpe(k, theta, torch.tensor([[j]]))).sum(-1)

    assert torch.allclose(scores(9, 4), (q * k * (theta * 5).cos()).sum(-1), atol=1e-12)
    assert torch.allclose(scores(9, 4), scores(1009, 1004), atol=1e-9)


def test_angles_fall_over_all_heads_together():
    theta = made(layer=0, layers=4).theta.detach()
    assert theta.flatten()[0] == 1
    assert theta[1, 0] == pytest.approx(10000**-1)
    assert made(layer=1, layers=4).theta is None
    assert made(layer=1, layers=4, lrpe=True).theta.shape == (HEADS, D)


def test_several_tokens_at_once_move_the_position_by_their_number():
    mixer, x = made(lrpe=True), tokens(9)
    whole = mixer(x)[0]
    _, state = mixer(x[:, :4])
    assert torch.allclose(mixer(x[:, 4:], state=state)[0], whole[:, 4:], atol=1e-10)
    assert state.position.tolist() == [4, 4]


def test_beams_keep_their_own_positions():
    mixer, x = made(lrpe=True), tokens(6, rows=1)
    _, long = mixer(x)
    _, short = mixer(x[:, 3:])
    together = type(long).merge([long, short]).reorder(torch.tensor([1, 0]))
    step = tokens(1, rows=2)
    y, _ = mixer(step, state=together)
    assert torch.allclose(y[0], mixer(step[:1], state=short)[0][0], atol=1e-12)
    assert torch.allclose(y[1], mixer(step[1:], state=long)[0][0], atol=1e-12)


def test_the_state_stays_finite_where_the_factored_form_overflows():
    torch.manual_seed(0)
    mixer = create_mixer("transnormerllm", dim=8, heads=8, lrpe=False).eval()
    slope = -float(mixer.log_decay()[0])
    assert slope == pytest.approx(0.5, rel=1e-3)
    assert torch.tensor(slope * 20000).exp() == torch.inf
    state, y = None, None
    with torch.no_grad():
        for piece in torch.randn(1, 20000, 8).split(10000, 1):
            y, state = mixer(piece, state=state)
        for _ in range(3):
            y, state = mixer(torch.randn(1, 1, 8), state=state)
    assert bool(y.isfinite().all())
    assert bool(state.memory.isfinite().all())


def test_with_activated_values_it_is_lightning_attention_up_to_norm_and_gate():
    ours, x = made(lrpe=False, layer=1, layers=4), tokens()
    theirs = create_mixer("lightning", dim=DIM, heads=HEADS, layer=1, layers=4).double().eval()
    with torch.no_grad():
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), ours.qkvu_proj.weight.chunk(4)):
            getattr(theirs, name).weight.copy_(weight)

    def activate(module, given, out):
        q, k, v, u = out.chunk(4, -1)
        return torch.cat((q, k, F.silu(v), u), -1)

    attended = []
    ours.qkvu_proj.register_forward_hook(activate)
    for mixer in (ours, theirs):
        mixer.o_norm.register_forward_hook(lambda module, given, out: attended.append(given[0]))
        mixer(x)
    assert torch.allclose(*attended, atol=1e-12)


def test_norm_and_sglu():
    x = tokens()
    assert torch.allclose(simple_norm(DIM)(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-12)
    assert not list(simple_norm(DIM).parameters())
    layer = SGLU(DIM, 24).double()
    w1, w2, w3 = layer.l1.weight, layer.l2.weight, layer.l3.weight
    assert torch.allclose(layer(x), ((x @ w1.T) * (x @ w2.T)) @ w3.T, atol=1e-12)


def test_bad_options():
    with pytest.raises(OptionError, match="transnormerllm: dim=16 with heads=3, allowed: a multiple"):
        create_mixer("transnormerllm", dim=16, heads=3)
    with pytest.raises(OptionError, match=r"transnormerllm: eps=0\.0, allowed: > 0"):
        made(eps=0.0)
