"""SpikingBrain's two layers against their recurrences, and its spike codes against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.errors import OptionError, ShapeError, UnsupportedModelError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.spikes import (
    CODES,
    SpikeLinear,
    code_linears,
    decode,
    encode,
    firing_rate,
    spike_counts,
    spike_matmul,
    spiking,
)
from foveate.mixers.parts import RMSNorm


def made(spec: str, **options):
    torch.manual_seed(0)
    return create_mixer(spec, **{"dim": 16, "heads": 4, "kv_heads": 2, **options}).double().eval()


def tokens(length: int = 11, rows: int = 2) -> Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("gate", ["low-rank", "tied"])
@pytest.mark.parametrize("steps", [[11], [5, 1, 1, 4]])
def test_linear_layer_is_its_recurrence(gate, steps):
    mixer, x = made("spikingbrain", gate=gate), tokens()
    with torch.no_grad():
        mixer.o_norm.weight.mul_(1.7)
    q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if gate == "tied":
        q, k = q.sigmoid(), k.sigmoid()
        forget = 1 - k
    else:
        q, k = q.relu(), k.relu()
        forget = torch.sigmoid(mixer.decay_proj(x)).unflatten(-1, (2, 4)) ** (1 / 16)
    S = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    rows = []
    for t in range(11):
        S = forget[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append(torch.stack([(q[:, t, h, None] / 2 @ S[:, h // 2])[:, 0] for h in range(4)], 1))
    o = torch.stack(rows, 1)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * 1.7
    expected, found, state = mixer.o_proj(normed.flatten(2)), [], None
    for piece in x.split(steps, 1):
        y, state = mixer(piece, state=state)
        found.append(y)
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-8)
    assert torch.allclose(state.memory, S, atol=1e-8)


def test_an_open_gate_is_plain_linear_attention():
    mixer, x = made("spikingbrain"), tokens()
    with torch.no_grad():
        mixer.decay_proj[1].bias.fill_(1e3)
        mixer.decay_proj[1].weight.zero_()
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    k, v = (each.repeat_interleave(2, 1) for each in (k.relu(), v))
    o = (q.relu() @ k.transpose(-1, -2) / 2).tril() @ v
    expected = mixer.o_proj(RMSNorm(4).double()(o.transpose(1, 2)).flatten(2))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-10)


def test_a_silent_query_gives_zero():
    mixer = made("spikingbrain")
    with torch.no_grad():
        mixer.q_proj.weight.zero_()
        mixer.q_proj.bias.fill_(-1)
    assert not mixer(tokens())[0].any()


def test_state_is_kept_once_per_kv_head():
    assert made("spikingbrain")(tokens())[1].memory.shape == (2, 2, 4, 4)
    assert made("spikingbrain", kv_heads=4)(tokens())[1].memory.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("window", [0, 3, 40])
def test_window_layer_reads_itself_and_so_many_before(window):
    mixer, x = made("spikingbrain-window", window=window), tokens()
    plain = create_mixer("softmax", dim=16, heads=4, kv_heads=2, window=window, rope_base=1e6).double()
    plain.load_state_dict({name: mixer.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        # With biases of zero it is the plain layer; the bias of the values adds the same to every output.
        for name in ("q_proj", "k_proj"):
            getattr(mixer, name).bias.zero_()
        shift = mixer.o_proj(mixer.v_proj.bias.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten())
        assert shift.abs().max() > 0.01
        assert torch.allclose(mixer(x)[0], plain(x)[0] + shift, atol=1e-10)
    changed = x.clone()
    changed[:, 0] += 1
    if window < 10:
        assert torch.allclose(mixer(changed)[0][:, window + 1 :], mixer(x)[0][:, window + 1 :], atol=1e-12)
    assert not torch.allclose(mixer(changed)[0][:, min(window, 10)], mixer(x)[0][:, min(window, 10)], atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spikingbrain:gate=open", "gate='open', allowed: 'low-rank', 'tied'"),
        ("spikingbrain:kv_heads=3", "kv_heads=3, allowed: divisors of 4"),
        ("spikingbrain:gate_rank=0", "gate_rank=0, allowed: >= 1"),
        ("spikingbrain:temperature=0.0", "temperature=0.0, allowed: > 0"),
        ("spikingbrain:norm_eps=0.0", "norm_eps=0.0, allowed: > 0"),
        ("spikingbrain:head_dim=0", "head_dim=0, allowed: >= 1"),
        ("spikingbrain-window:window=-1", "window=-1, allowed: >= 0"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        create_mixer(spec, dim=16, heads=4)


counts_lists = st.lists(st.integers(-300, 300), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(values=counts_lists, code=st.sampled_from(CODES), spare=st.integers(0, 3))
def test_decoding_gives_back_what_was_coded(values, code, spare):
    counts = torch.tensor(values, dtype=torch.float64)
    if code in ("binary", "bitwise"):
        counts = counts.abs()
    spikes = encode(counts, code)
    largest = max(abs(int(value)) for value in values)
    bits = len(f"{largest:b}")
    expected = {"binary": max(largest, 1), "ternary": max(largest, 1), "twos-complement": bits + 1}.get(code, bits)
    assert spikes.shape == (expected, len(values))
    assert set(spikes.unique().tolist()) <= ({-1, 0, 1} if code in ("ternary", "bidirectional") else {0, 1})
    assert torch.equal(decode(spikes, code), counts)
    longer = encode(counts, code, expected + spare)
    assert longer.shape[0] == expected + spare
    assert torch.equal(decode(longer, code), counts)


def test_twos_complement_without_its_sign_is_the_remainder():
    spikes = encode(torch.tensor([-3.0, 5.0]), "twos-complement")
    assert spikes.T.tolist() == [[1, 1, 0, 1], [0, 1, 0, 1]]
    assert decode(spikes, "twos-complement", signed=False).tolist() == [13, 5]


@pytest.mark.parametrize("code", CODES)
def test_spikes_multiply_as_counts_do(code):
    torch.manual_seed(0)
    counts, weight = torch.randint(0, 9, (3, 4, 12)).float(), torch.randint(-9, 9, (12, 5)).float()
    if code not in ("binary", "bitwise"):
        counts = counts - 4
    assert torch.equal(spike_matmul(encode(counts, code), weight, code), counts @ weight)


def test_counts_are_rounded_within_half_a_threshold_and_finer_with_k():
    x = tokens()
    errors = []
    for k in (1.0, 3.0, 12.0):
        counts, threshold = spike_counts(x, k)
        assert torch.equal(counts, counts.round())
        assert torch.allclose(threshold[..., 0], x.abs().mean(-1) / k)
        assert bool(((x - counts * threshold).abs() <= threshold / 2 + 1e-12).all())
        errors.append(float((x - counts * threshold).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert spike_counts(torch.tensor([[0.5, 1.5, -1.5, 2.5]]), 1.5)[0].tolist() == [[0, 2, -2, 2]]
    silent, least = spike_counts(torch.zeros(1, 4))
    assert silent.tolist() == [[0, 0, 0, 0]]
    assert least.item() == pytest.approx(1e-5)


def test_gradients_pass_the_rounding():
    y = tokens().requires_grad_()
    counts, threshold = spike_counts(y)
    (counts * threshold).sum().backward()
    assert torch.allclose(y.grad, torch.ones_like(y) + _through_threshold(y), atol=1e-9)


def _through_threshold(y: Tensor) -> Tensor:
    """d sum(s Vth) beyond the identity: (s - x / Vth) dVth, with dVth = sign(x) / (C k)."""
    counts, threshold = spike_counts(y.detach())
    rest = (counts - y.detach() / threshold).sum(-1, keepdim=True)
    return rest * y.detach().sign() / (y.shape[-1] * 3)


def test_firing_rate_is_the_share_of_spikes():
    assert firing_rate(encode(torch.tensor([2.0, 0.0, -1.0]), "ternary")).item() == pytest.approx(3 / 6)


def test_coded_linear_layer_is_its_integers():
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 5), tokens().float()
    layer = SpikeLinear.of(linear, group=8)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == (5, 2, 8)
    assert (layer.matrix() - linear.weight).abs().max() <= layer.scale.max() / 2 + 1e-7
    counts, threshold = spike_counts(x)
    expected = threshold * (counts @ layer.matrix().T) + linear.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(SpikeLinear.of(linear, k=None, group=8)(x), x @ layer.matrix().T + linear.bias, atol=1e-6)
    half = linear.to(torch.bfloat16)
    assert SpikeLinear.of(half, group=8)(x.bfloat16()).dtype == torch.bfloat16
    zero = nn.Linear(4, 2)
    nn.init.zeros_(zero.weight)
    assert torch.equal(SpikeLinear.of(zero)(torch.ones(1, 4)), zero.bias[None])


@torch.no_grad()
def test_calibrated_scales_are_used_as_given():
    torch.manual_seed(0)
    linear, scale = nn.Linear(16, 5), torch.full((5, 2, 1), 0.01)
    layer = SpikeLinear.of(linear, group=8, scale=scale)
    expected = (linear.weight / 0.01).round().clamp(-127, 127) * 0.01
    assert torch.allclose(layer.matrix(), expected, atol=1e-7)


@torch.no_grad()
def test_a_model_is_coded_within_the_block_and_restored_after_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.ModuleDict({"lm_head": nn.Linear(32, 4)})["lm_head"])
    model = nn.ModuleDict({"body": model, "lm_head": nn.Linear(4, 4)})
    x = tokens().float()

    def run() -> Tensor:
        return model["lm_head"](model["body"](x))

    before, layers = run(), dict(model.named_modules())
    coarse, fine = 0.0, 0.0
    with spiking(model, k=3.0, group=16) as coded:
        assert set(coded) == {"body.0", "body.2"}
        coarse = float((run() - before).norm())
    with spiking(model, k=300.0, group=16):
        fine = float((run() - before).norm())
    assert coarse > 2 * fine > 0
    assert torch.equal(run(), before)
    assert dict(model.named_modules()) == layers
    with pytest.raises(ValueError, match="stop"), spiking(model, group=16):
        raise ValueError("stop")
    assert torch.equal(run(), before)


@torch.no_grad()
def test_layers_are_coded_for_good_in_groups_that_fit():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(18, 6), "lm_head": nn.Linear(6, 4)})
    plain, x = model["body"], torch.randn(3, 18)
    assert code_linears(model, 3.0, group=8) == ["body"]
    # The largest divisor of 18 up to 8.
    assert model["body"].weight.shape == (6, 3, 6)
    assert (model["body"].in_features, model["body"].out_features) == (18, 6)
    assert torch.equal(model["body"](x), SpikeLinear.of(plain, group=6)(x))
    assert isinstance(model["lm_head"], nn.Linear)
    with pytest.raises(UnsupportedModelError, match="ModuleDict has no linear layers outside"):
        code_linears(model)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="code='morse', allowed: "):
        encode(torch.ones(2), "morse")
    with pytest.raises(ShapeError, match="counts down to -2 with code='binary', allowed: >= 0"):
        encode(torch.tensor([1.0, -2.0]), "binary")
    with pytest.raises(ShapeError, match="counts up to 9 in steps=3 with code='bitwise', allowed: >= 4"):
        encode(torch.tensor([9.0]), "bitwise", 3)
    with pytest.raises(OptionError, match=r"k=0.0, allowed: > 0"):
        spike_counts(torch.ones(2), 0.0)
    with pytest.raises(OptionError, match="group=6, allowed: divisors of in_features = 16"):
        SpikeLinear.of(nn.Linear(16, 2), group=6)
    with pytest.raises(ShapeError, match=r"scale \[2, 1, 1\], allowed: \[2, 2, 1\], all > 0"):
        SpikeLinear.of(nn.Linear(16, 2), group=8, scale=torch.ones(2, 1, 1))
    with pytest.raises(OptionError, match=r"k=-1.0, allowed: > 0, or None"):
        SpikeLinear.of(nn.Linear(16, 2), k=-1.0)
    with (
        pytest.raises(UnsupportedModelError, match="Sequential has no linear layers"),
        spiking(nn.Sequential(nn.GELU())),
    ):
        pass
