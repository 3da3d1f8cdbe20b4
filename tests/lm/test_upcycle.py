"""Experts upcycled from dense blocks, and models on spikes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError, UnsupportedModelError
from foveate.lm import HybridConfig, HybridLM, spike_coded, upcycle
from foveate.lm.mlp import SwiGLU, UpcycledMLP
from foveate.mixers.linear.spikes import SpikeLinear, spike_counts, spiking

IDS = torch.randint(1, 97, (2, 14), generator=torch.Generator().manual_seed(3))


def tiny(mixers: tuple[str, ...] = ("gla", "softmax", "gla"), **options: Any) -> HybridLM:
    torch.manual_seed(0)
    given = {"dim": 32, "heads": 2, "vocab_size": 97, "mlp_multiple": 16, "initializer_range": 0.2, **options}
    return HybridLM(HybridConfig(mixers=list(mixers), **given)).double().eval()


@torch.no_grad()
def logits(model: HybridLM, ids: Tensor = IDS, **given: Any) -> Tensor:
    return model(ids, **given).logits


def silence(model: HybridLM) -> None:
    """Routers of zeros: every expert has p = 1 / N."""
    with torch.no_grad():
        for block in model.layers:
            if isinstance(block.mlp, UpcycledMLP):
                block.mlp.router.weight.zero_()


@torch.no_grad()
@pytest.mark.parametrize(("top", "shared"), [(1, 1), (2, 0), (3, 2), (5, 1)])
def test_a_block_of_experts_is_its_definition(top, shared):
    torch.manual_seed(0)
    block = UpcycledMLP(6, 8, experts=5, top=top, shared=shared, noise=3.0).double().eval()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(7):
            token = x[b, t]
            p = (block.router.weight @ token).softmax(0)
            for each in block.shared:
                expected[b, t] += each(token)
            for number in sorted(range(5), key=lambda n: float(p[n]))[5 - top :]:
                expert = block.experts[number]
                gate, up = expert.gate_proj.weight @ token, expert.up_proj.weight @ token
                expected[b, t] += p[number] * (expert.down_proj.weight @ (gate * gate.sigmoid() * up))
    assert torch.allclose(block(x), expected, atol=1e-12)
    assert torch.allclose(torch.cat([block(x[:, :3]), block(x[:, 3:])], 1), expected, atol=1e-12)


def test_every_expert_that_is_chosen_and_the_router_learn():
    torch.manual_seed(0)
    block, x = UpcycledMLP(6, 8, experts=3, top=2), torch.randn(4, 6)
    block(x).square().sum().backward()
    _, chosen = block.route(x)
    for number, expert in enumerate(block.experts):
        assert (expert.down_proj.weight.grad is not None) == bool((chosen == number).any())
    assert block.router.weight.grad.any()


def test_noise_moves_routes_in_training_only():
    torch.manual_seed(0)
    block, x = UpcycledMLP(6, 8, experts=16, noise=5.0), torch.randn(64, 6)
    assert not torch.equal(block.train().route(x)[1], block.route(x)[1])
    assert torch.equal(block.eval().route(x)[1], block.route(x)[1])


@torch.no_grad()
@pytest.mark.parametrize(("top", "shared"), [(1, 1), (2, 1), (1, 2)])
def test_an_even_router_gives_the_dense_model_back(top, shared):
    """p = 1 / N: "down" undoes the sum exactly, "none" leaves (S + k / N) of it, "cube-root" is near."""
    dense = tiny()
    made = {
        scale: upcycle(dense, experts=4, top=top, shared=shared, scale=scale) for scale in ("down", "none", "cube-root")
    }
    for each in made.values():
        silence(each)
    assert torch.allclose(logits(made["down"]), logits(dense), atol=1e-10)
    x = torch.randn(3, 32, dtype=torch.float64)
    block, whole = dense.layers[1].mlp, shared + top / 4
    y = block(x)
    assert torch.allclose(made["none"].layers[1].mlp(x), whole * y, atol=1e-12)
    alpha = whole ** (-1 / 3)
    scaled = F.silu(alpha * block.gate_proj(x)) * (alpha * block.up_proj(x)) @ (alpha * block.down_proj.weight.T)
    assert torch.allclose(made["cube-root"].layers[1].mlp(x), whole * scaled, atol=1e-12)
    # What is left comes of silu alone.
    assert (whole * scaled - y).norm() < 0.35 * (whole - 1) * y.norm()


@torch.no_grad()
def test_the_reports_scale():
    """S = k = 1 and N = 16: every matrix times 0.98."""
    dense = tiny(("gla",))
    made = upcycle(dense).layers[0].mlp
    assert (len(made.experts), len(made.shared), made.top) == (16, 1, 1)
    for expert in (*made.experts, *made.shared):
        for name, value in expert.state_dict().items():
            ratio = value / dense.layers[0].mlp.state_dict()[name]
            assert torch.allclose(ratio, torch.full_like(ratio, (17 / 16) ** (-1 / 3)))
            assert ratio.mean().item() == pytest.approx(0.98, abs=1e-3)


def test_upcycled_models_save_generate_and_share_what_is_not_theirs(tmp_path):
    dense = tiny(tie_embeddings=False)
    before = {name: each.clone() for name, each in dense.state_dict().items()}
    made = upcycle(dense, experts=4, top=2, dense_layers=[1], noise=0.1, seed=5)
    assert [type(block.mlp) for block in made.layers] == [UpcycledMLP, SwiGLU, UpcycledMLP]
    assert made.layers[0].mixer.q_proj.weight.data_ptr() == dense.layers[0].mixer.q_proj.weight.data_ptr()
    pointers = [each.up_proj.weight.data_ptr() for each in (*made.layers[0].mlp.experts, *made.layers[0].mlp.shared)]
    assert len({*pointers, dense.layers[0].mlp.up_proj.weight.data_ptr()}) == 6
    assert all(torch.equal(each, before[name]) for name, each in dense.state_dict().items())
    routers = [made.layers[n].mlp.router.weight for n in (0, 2)]
    assert not torch.equal(*routers)
    assert routers[0].std().item() == pytest.approx(0.2, rel=0.2)
    assert torch.equal(upcycle(dense, experts=4, dense_layers=[1], seed=5).layers[2].mlp.router.weight, routers[1])
    made.save_pretrained(tmp_path)
    loaded = HybridLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.dense_layers == [1]
    assert torch.allclose(logits(loaded), logits(made), atol=1e-12)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    both = made.generate(IDS, attention_mask=mask, **options)
    assert both[0, 14:].tolist() == made.generate(IDS[:1, 5:], **options)[0, 9:].tolist()


def test_what_cannot_be_upcycled_is_refused():
    with pytest.raises(OptionError, match="a model with experts=0, mlp_ratio=0, spike_k=None, allowed: one with dense"):
        upcycle(tiny(mlp_ratio=0))
    with pytest.raises(OptionError, match="a model with experts=2"):
        upcycle(tiny(experts=2))
    with pytest.raises(OptionError, match="spike_k=3.0, allowed: one with dense SwiGLU blocks that is not coded"):
        upcycle(spike_coded(tiny()))
    with pytest.raises(OptionError, match="experts=0, scale='cube-root', allowed: experts >= 1"):
        upcycle(tiny(), experts=0)
    with pytest.raises(OptionError, match="scale='half', allowed: experts >= 1, a scale of"):
        upcycle(tiny(), scale="half")
    with pytest.raises(OptionError, match="top_experts=3, allowed: <= experts = 2"):
        upcycle(tiny(), experts=2, top=3)
    with pytest.raises(OptionError, match=r"dense_layers=\[3\], allowed: layers from 0 to 2"):
        upcycle(tiny(), dense_layers=[3])


@torch.no_grad()
def test_a_coded_model_is_the_one_inside_the_block(tmp_path):
    model = tiny(("spikingbrain", "spikingbrain-window:window=4"), experts=2).float()
    before = logits(model)
    coded = spike_coded(model, k=6.0, group=16)
    assert torch.equal(logits(model), before)
    with spiking(model, k=6.0, group=16):
        expected = logits(model)
    assert torch.equal(logits(coded), expected)
    left = [name for name, each in coded.named_modules() if isinstance(each, torch.nn.Linear)]
    assert left == ["lm_head"]
    layer = coded.layers[0].mixer.q_proj
    assert isinstance(layer, SpikeLinear)
    x = torch.randn(3, 32)
    counts, threshold = spike_counts(x, 6.0)
    assert torch.allclose(layer(x), threshold * (counts @ layer.matrix().T) + layer.bias, atol=1e-6)
    coded.save_pretrained(tmp_path)
    loaded = HybridLM.from_pretrained(tmp_path)
    assert loaded.layers[1].mlp.experts[0].up_proj.weight.dtype == torch.int8
    assert torch.equal(logits(loaded), logits(coded))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = loaded.generate(IDS, **options)
    assert torch.equal(cached, coded.generate(IDS, use_cache=False, **options))
    errors = [float((logits(spike_coded(model, k=k)) - before).norm()) for k in (1.0, 3.0, 300.0)]
    assert errors[0] > errors[1] > errors[2]


def test_a_coded_half_precision_model_comes_back_as_it_was(tmp_path):
    coded = spike_coded(tiny(("softmax",)).bfloat16())
    coded.save_pretrained(tmp_path)
    loaded = HybridLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(coded))


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(OptionError, match="k=0.0, group=128, allowed: k > 0, group >= 1"):
        spike_coded(tiny(), k=0.0)
    with pytest.raises(OptionError, match="coded with k=3.0, allowed: one that is not"):
        spike_coded(spike_coded(tiny()))
    with pytest.raises(
        UnsupportedModelError, match=r"a mixer of \['ecoformer'\] reads a linear layer's weights itself"
    ):
        spike_coded(tiny(("ecoformer",)))
