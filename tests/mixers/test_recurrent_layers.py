"""S6 and RG-LRU against transformers' Mamba and RecurrentGemma, and what all the diagonal recurrences refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, RecurrentGemmaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.rg_lru import RGLRU
from foveate.mixers.linear.s6 import selective_scan

DIM, HEADS = 16, 2


def made(spec: str, **options):
    torch.manual_seed(0)
    return create_mixer(spec, dim=DIM, heads=HEADS, **options).double().eval()


def tokens(length: int = 11) -> Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.double().eval()


def renamed(module: torch.nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    weights = {}
    for name, value in module.state_dict().items():
        start = next((theirs for theirs in names if name.startswith(theirs)), None)
        weights[name if start is None else names[start] + name.removeprefix(start)] = value
    return weights


def test_s6_is_transformers_mamba():
    config = MambaConfig(hidden_size=DIM, state_size=5, conv_kernel=4, expand=2, time_step_rank=3)
    theirs = scrambled(MambaMixer(config, layer_idx=0))
    ours = made("s6:state_dim=5,step_rank=3")
    names = {"conv1d.": "conv.", "dt_proj.bias": "dt_bias", "out_proj.": "o_proj."}
    ours.load_state_dict(renamed(theirs, names))
    # Theirs takes A and the scan in float32.
    assert torch.allclose(ours(tokens())[0], theirs(tokens()), atol=1e-5)


def test_rg_lru_is_transformers_recurrent_gemma():
    config = RecurrentGemmaConfig(hidden_size=DIM, lru_width=DIM, num_attention_heads=HEADS, conv1d_width=4)
    theirs = scrambled(RecurrentGemmaRecurrentBlock(config, 0))
    ours = made("rg-lru")
    names = {
        "linear_y.": "y_proj.",
        "linear_x.": "x_proj.",
        "linear_out.": "o_proj.",
        "conv_1d.": "conv.",
        "rg_lru.": "lru.",
    }
    ours.load_state_dict(renamed(theirs, names))
    found = theirs(tokens(), torch.arange(11).expand(2, -1), None, use_cache=False)
    # Older versions of transformers return the output alone.
    expected = found if isinstance(found, Tensor) else found[0]
    assert torch.allclose(ours(tokens())[0], expected, atol=1e-5)


def test_the_root_is_left_out_at_a_first_token_only():
    torch.manual_seed(0)
    lru, x = RGLRU(DIM, HEADS).double(), tokens(4)
    h0 = x.new_zeros(2, DIM)
    y, _ = lru(x, h0, torch.tensor([False, True]))
    assert torch.allclose(y[0, 0], x[0, 0] * lru.gate(x, "input")[0, 0], atol=1e-12)
    root = (1 - (2 * lru.log_keep(x)[1, 0]).exp()).sqrt()
    assert torch.allclose(y[1, 0], x[1, 0] * lru.gate(x, "input")[1, 0] * root, atol=1e-12)


def test_a_gate_that_forgets_nothing_has_finite_gradients():
    lru = RGLRU(DIM, HEADS)
    with torch.no_grad():
        lru.recurrent_param.fill_(-200.0)
    x = torch.randn(1, 5, DIM, requires_grad=True)
    y, _ = lru(x, torch.zeros(1, DIM), torch.ones(1, dtype=torch.bool))
    found = torch.autograd.grad(y.sum(), (x, *lru.parameters()))
    assert all(bool(each.isfinite().all()) for each in found)


def test_initial_decays_of_rg_lru():
    rate = torch.nn.functional.softplus(RGLRU(4096, 4).recurrent_param)
    assert 0.899 < torch.exp(-rate).min() < 0.91
    assert 0.99 < torch.exp(-rate).max() < 0.9991


def test_groups_and_pieces_of_a_selective_scan_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, dt, A, B, C = normal(2, 7, 6), normal(2, 7, 6).abs(), -normal(6, 3).abs(), normal(2, 7, 2, 3), normal(2, 7, 2, 3)
    y, state = selective_scan(u, dt, A, B, C)
    halves = [
        selective_scan(u[..., part], dt[..., part], A[part], B[:, :, g], C[:, :, g])
        for g, part in enumerate((slice(0, 3), slice(3, 6)))
    ]
    assert torch.allclose(y, torch.cat([each[0] for each in halves], -1), atol=1e-12)
    assert torch.allclose(state, torch.cat([each[1] for each in halves], 1), atol=1e-12)
    monkeypatch.setattr("foveate.mixers.linear.s6.PIECE_ENTRIES", 2 * 2 * 7 * 3)
    pieces, last = selective_scan(u, dt, A, B, C, initial_state=state)
    monkeypatch.undo()
    whole, end = selective_scan(u, dt, A, B, C, initial_state=state)
    assert torch.allclose(pieces, whole, atol=1e-12)
    assert torch.allclose(last, end, atol=1e-12)


def test_bad_shapes_and_decays_of_a_selective_scan():
    u, B = torch.zeros(1, 4, 6), torch.zeros(1, 4, 4, 3)
    with pytest.raises(ShapeError, match="u has 6 channels and B has 4 groups, allowed: a divisor"):
        selective_scan(u, u, -torch.ones(6, 3), B, B)
    with pytest.raises(ShapeError, match="n is 3 in A"):
        selective_scan(u, u, -torch.ones(6, 3), torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    with pytest.raises(OptionError, match="g"):
        selective_scan(u, torch.ones_like(u), torch.ones(6, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rg-lru:expand=0.2", "expand=0.2, allowed: a width that 2 heads divide"),
        ("rg-lru:kernel=0", "kernel=0, allowed: >= 1"),
        ("s6:expand=0.0", "expand=0.0, allowed: at least one channel"),
        ("s6:state_dim=0", "state_dim=0, allowed: >= 1"),
        ("s6:kernel=0", "kernel=0, allowed: >= 1"),
        ("s6:step_rank=0", "step_rank=0, allowed: >= 1"),
        ("qlstm:expand=0.0", "expand=0.0, allowed: at least one channel"),
        ("qlstm:kernel=0", "kernel=0, allowed: >= 1"),
        ("normalised-attention:keys=3", "keys=3, allowed: multiples of heads = 2"),
        ("normalised-attention:bound=0.0", "bound=0.0, allowed: > 0, or none"),
        ("normalised-attention:typical_length=0", "typical_length=0, allowed: >= 1"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        made(spec)
