"""The linear mixers against their definitions, against each other, and against transformers' Mamba-2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMamba2

from foveate.errors import OptionError, ShapeError, StateError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.hgrn import forget_lower_bounds


def made(spec: str, **options):
    torch.manual_seed(0)
    given = {"dim": 16, "heads": 2, **options}
    return create_mixer(spec, **given).double().eval()


def tokens(length: int = 11, dim: int = 16, rows: int = 1) -> Tensor:
    return torch.randn(rows, length, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def weighted(mixer, x: Tensor, weights: Tensor) -> Tensor:
    """Rows of weights [B, H, N, N] on the values, then the output projection."""
    return mixer.o_proj((weights @ heads_of(mixer.v_proj(x), mixer.heads)).transpose(1, 2).flatten(2))


def test_linear_attention_is_its_matrix_of_weights():
    mixer, x = made("linear"), tokens()
    q, k = (F.elu(heads_of(p(x), 2)) + 1 for p in (mixer.q_proj, mixer.k_proj))
    scores = (q @ k.transpose(-1, -2)).tril()
    expected = weighted(mixer, x, scores / (scores.sum(-1, keepdim=True) + 1e-6))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-12)
    full = q @ k.transpose(-1, -2)
    both_ways = made("linear:causal=false")
    expected = weighted(mixer, x, full / (full.sum(-1, keepdim=True) + 1e-6))
    assert torch.allclose(both_ways(x)[0], expected, atol=1e-12)


def test_identity_features_without_normaliser():
    mixer, x = made("linear:feature_map=identity,normalize=false"), tokens()
    q, k = (heads_of(p(x), 2) for p in (mixer.q_proj, mixer.k_proj))
    assert torch.allclose(mixer(x)[0], weighted(mixer, x, (q @ k.transpose(-1, -2)).tril() * 8**-0.5), atol=1e-12)


def test_based_is_the_taylor_expansion_of_softmax():
    mixer, x = made("based:feature_dim=6"), tokens()
    q, k = (heads_of(p(x), 2) for p in (mixer.q_proj, mixer.k_proj))
    s = q @ k.transpose(-1, -2) * 6**-0.5
    scores = (1 + s + s * s / 2).tril()
    assert bool((scores >= 0).all())
    assert torch.allclose(mixer(x)[0], weighted(mixer, x, scores / scores.sum(-1, keepdim=True)), atol=1e-10)
    first = mixer.o_proj(mixer.v_proj(x[:, :1]))
    assert torch.allclose(mixer(x)[0][:, :1], first, atol=1e-10)


def test_based_state_keeps_symmetric_products_once():
    packed, full, x = made("based"), made("based:packed=false"), tokens()
    assert torch.allclose(packed(x)[0], full(x)[0], atol=1e-9)
    assert packed(x)[1].memory.shape[2] == 153
    assert full(x)[1].memory.shape[2] == 273


@pytest.mark.parametrize("decay", ["alibi", "lightning", "none"])
def test_lightning_is_its_decayed_matrix(decay):
    mixer, x = made("lightning", decay=decay, layer=2, layers=5), tokens()
    slopes = {
        "alibi": [2**-4 * (1 - 2 / 4 + 1e-5), 2**-8 * (1 - 2 / 4 + 1e-5)],
        "lightning": [0.0, 4 * (1 - 2 / 5)],
        "none": [0.0, 0.0],
    }[decay]
    q, k, v = (heads_of(F.silu(p(x)), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    distance = (torch.arange(11)[:, None] - torch.arange(11)).double()
    weight = torch.exp(-torch.tensor(slopes).double()[:, None, None] * distance.clamp(min=0)).tril()
    o = ((q @ k.transpose(-1, -2) * weight) @ v).transpose(1, 2).flatten(2)
    expected = mixer.o_proj(F.layer_norm(o, (16,)) * torch.sigmoid(mixer.gate_proj(x)))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-6)


def test_gated_deltanet_that_forgets_nothing_is_deltanet_with_a_gate():
    delta = made("deltanet:gate=true")
    gated = made("gated-deltanet", head_dim=8, expand_v=1.0)
    own = gated.state_dict()
    gated.load_state_dict({**own, **{name: each for name, each in delta.state_dict().items() if name in own}})
    with torch.no_grad():
        gated.A_log.fill_(-200)
    assert torch.allclose(gated(tokens())[0], delta(tokens())[0], atol=1e-10)


def test_deltanet_with_full_strength_replaces_what_a_key_held():
    mixer = made("deltanet:kernel=1", heads=1)
    with torch.no_grad():
        mixer.b_proj.weight.zero_()
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)
        for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv):
            conv.weight.fill_(1)
    x = tokens(2)
    memory = mixer(x)[1].memory
    k = F.normalize(F.silu(mixer.k_proj(x)), dim=-1)
    v = F.silu(mixer.v_proj(x))
    # beta is 1/2: half of the first value, then half of what is missing.
    first = 0.5 * torch.outer(k[0, 0], v[0, 0])
    expected = first + 0.5 * torch.outer(k[0, 1], v[0, 1] - k[0, 1] @ first)
    assert torch.allclose(memory[0, 0], expected, atol=1e-5)


def test_lower_bounds_rise_from_zero_and_stay_below_one():
    table = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    bounds = forget_lower_bounds(table)
    assert bool((bounds[0] == 0).all())
    assert bool((bounds.diff(dim=0) >= 0).all())
    assert bool((bounds < 1).all())
    assert torch.allclose(forget_lower_bounds(torch.zeros(4, 1))[:, 0], torch.arange(4) / 4)


def test_hgrn2_of_single_channel_heads_is_hgrns_recurrence():
    mixer, x = made("hgrn2", heads=16, layer=1, layers=3), tokens()
    forget = 1 / 3 + 2 / 3 * torch.sigmoid(mixer.f_proj(x))
    h, rows = torch.zeros(1, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = forget[:, t] * h + (1 - forget[:, t]) * mixer.i_proj(x[:, t])
        rows.append(h * F.silu(mixer.q_proj(x[:, t])))
    expected = mixer.o_proj(mixer.o_norm(torch.stack(rows, 1)))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-8)


def test_layers_of_a_model_share_the_table_of_bounds_from_layer_one_on():
    assert made("hgrn", layer=0, layers=3).lower_bounds is None
    assert made("hgrn", layer=2, layers=3).lower_bounds.shape == (3, 16)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers_mamba2(groups):
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, expand=2, state_size=5, n_groups=groups, chunk_size=4, use_bias=False
    )
    torch.manual_seed(0)
    theirs = TheirMamba2(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    ours = made("mamba2", heads=4, state_dim=5, groups=groups)
    names = {"conv1d.": "conv.", "norm.": "o_norm.", "out_proj.": "o_proj."}
    weights = {}
    for name, value in theirs.state_dict().items():
        new = next((ours_ + name.removeprefix(t) for t, ours_ in names.items() if name.startswith(t)), name)
        weights[new] = value
    ours.load_state_dict(weights)
    assert ours.o_norm.groups == groups
    # Older versions norm over the full width whatever the groups; ours, as the authors', over each group's share.
    ours.o_norm.groups = groups if hasattr(theirs.norm, "group_size") else 1
    x = tokens(rows=2)
    assert torch.allclose(ours(x)[0], theirs(x), atol=1e-4)


@pytest.mark.parametrize("filter", ["implicit", "explicit"])
def test_a_long_convolution_is_its_sum(filter):
    mixer, x = made("baseconv:kernel=none,max_length=20", filter=filter), tokens()
    taps = mixer.long.taps_of(11)
    convolved = torch.stack([sum(taps[:, t - s] * x[0, s] for s in range(t + 1)) + x[0, t] for t in range(11)])
    expected = mixer.projection(x[0]) * convolved + x[0]
    assert torch.allclose(mixer(x)[0][0], expected, atol=1e-10)


def test_a_long_convolution_has_an_end():
    mixer = made("baseconv:kernel=none,max_length=8")
    _, state = mixer(tokens(8))
    with pytest.raises(ShapeError, match="9 tokens with max_length=8"):
        mixer(tokens(1), state=state)


def selecting(spec: str, bias: float):
    """Lookups where every token selects with sigmoid(bias) or so."""
    mixer = made(spec, heads=1)
    with torch.no_grad():
        mixer.select.weight.zero_()
        if mixer.select.bias is not None:
            mixer.select.bias.copy_(torch.tensor([-bias, bias]))
    return mixer


def dense(mixer, x: Tensor) -> Tensor:
    q, k, v = mixer.qkv_proj(x).chunk(3, -1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return mixer.o_proj((q @ k.transpose(-1, -2) / 4).masked_fill(later, -torch.inf).softmax(-1) @ v)


def test_lookups_of_all_tokens_are_attention_and_of_none_the_identity():
    x = tokens()
    everyone = selecting("lookups:selection=two-way", 200.0)
    assert torch.allclose(everyone(x)[0], x + dense(everyone, x), atol=1e-10)
    assert torch.equal(selecting("lookups:selection=two-way", -200.0)(x)[0], x)


def test_lookups_read_only_where_selected():
    mixer, x = made("lookups", heads=1), tokens()
    sel = torch.sigmoid(mixer.select(x))
    expected = x + torch.where(sel > 0.5, sel, 0) * dense(mixer, x)
    assert 0 < int((sel > 0.5).sum()) < 11
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)
    mixer.train()
    assert torch.allclose(mixer(x)[0], x + sel * dense(mixer, x), atol=1e-10)


def test_lookup_loss_is_zero_up_to_the_budget():
    x = tokens(16)
    mixer = made("lookups:penalty=2.0", heads=1).train()
    loss = mixer(x)[1].auxiliary_loss
    mean = torch.sigmoid(mixer.select(x)).mean()
    assert torch.allclose(loss, 2 * (mean - 4 / 16))
    assert loss.item() > 0
    generous = made("lookups:penalty=2.0,lookups=15", heads=1).train()
    assert generous(x)[1].auxiliary_loss.item() == 0
    halves = mixer(x, cu_seqlens=torch.tensor([0, 4, 16]))[1]
    assert torch.allclose(halves.auxiliary_loss, 2 * (mean - (2 + 12**0.5) / 16))


def test_lookups_over_the_whole_sequence_refuse_to_continue():
    for spec in ("lookups:evaluation=top-k", "lookups:selection=softmax,evaluation=top-k"):
        mixer = made(spec, heads=1)
        _, state = mixer(tokens())
        with pytest.raises(StateError, match="look at the whole sequence"):
            mixer(tokens(1), state=state)
    with pytest.raises(OptionError, match="selection='softmax' with evaluation='threshold'"):
        made("lookups:selection=softmax")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("linear:feature_map=exp", "feature_map='exp', allowed: "),
        ("linear:feature_map=identity", "with normalize=True"),
        ("retnet:expand_k=0.1", "expand_k=0.1"),
        ("gla:temperature=0.0", "temperature=0.0, allowed: > 0"),
        ("gla:least_decay=1.0", "least_decay=1.0, allowed: <= 0"),
        ("deltanet:kernel=0", "kernel=0, allowed: >= 1"),
        ("gated-deltanet:value_heads=3", "value_heads=3, allowed: a multiple of heads = 2"),
        ("mamba2:groups=3", "groups=3, allowed: divisors of heads = 2"),
        ("lightning:decay=fast", "decay='fast', allowed: "),
        ("hgrn:expand=0.0", "expand=0.0, allowed: at least one channel"),
        ("based:feature_dim=0", "feature_dim=0, allowed: >= 1"),
        ("baseconv:kernel=0", "kernel=0, allowed: >= 1, or none"),
        ("baseconv:filter=fourier", "filter='fourier', allowed: "),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        made(spec)
