"""Aaren is ordinary attention of one learned query over every prefix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError
from foveate.mixers.base import create_mixer

DIM, HEADS = 16, 2


def made(dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    return create_mixer("aaren", dim=DIM, heads=HEADS, **options).to(dtype).eval()


def tokens(length: int = 11) -> Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_every_output_is_attention_of_the_learned_query_over_the_prefix():
    mixer, x = made(), tokens()
    k, v = heads_of(mixer.k_proj(x)), heads_of(mixer.v_proj(x))
    q = heads_of(mixer.q_proj(mixer.query).expand(2, 11, -1))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(o.transpose(1, 2).flatten(2)), atol=1e-12)


def test_without_a_scale_scores_are_larger():
    x, plain, scaled = tokens(), made(scaled=False), made()
    with torch.no_grad():
        scaled.query.mul_((DIM // HEADS) ** 0.5)
    assert torch.allclose(plain(x)[0], scaled(x)[0], atol=1e-12)


def test_a_query_of_zero_gives_the_running_mean():
    mixer, x = made(), tokens()
    with torch.no_grad():
        mixer.query.zero_()
    mean = mixer.v_proj(x).cumsum(1) / torch.arange(1, 12)[:, None]
    assert torch.allclose(mixer(x)[0], mixer.o_proj(mean), atol=1e-12)


def test_order_within_a_prefix_changes_nothing():
    mixer, x = made(), tokens()
    assert torch.allclose(mixer(x.flip(1))[0][:, -1], mixer(x)[0][:, -1], atol=1e-12)


def test_scores_of_a_thousand_neither_overflow_nor_lose_early_tokens():
    mixer, x = made(torch.float32), tokens().float()
    with torch.no_grad():
        mixer.query.mul_(1e4 / mixer.query.norm())
    exact = made().eval()
    exact.load_state_dict(mixer.state_dict())
    scores = (mixer.k_proj(x) @ mixer.q_proj(mixer.query)).abs().max()
    assert scores > 1e3
    outputs, state = [], None
    for token in x.split(1, 1):
        y, state = mixer(token, state=state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1).double(), exact(x.double())[0], atol=2e-3)
    first = mixer.o_proj(mixer.v_proj(x[:, :1]))[:, 0]
    assert torch.allclose(mixer(x)[0][:, 0], first, atol=1e-6)


def test_the_query_costs_one_vector_more_than_attention():
    attention = create_mixer("softmax", dim=512, heads=8)
    count = [sum(each.numel() for each in mixer.parameters()) for mixer in (attention, create_mixer("aaren", dim=512))]
    assert count[1] - count[0] == 512


def test_bad_options():
    with pytest.raises(OptionError, match="aaren: dim=16 with heads=3, allowed: a multiple"):
        create_mixer("aaren", dim=16, heads=3)
