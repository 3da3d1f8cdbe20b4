"""Flow-Attention: what its conserved flows are, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.flow import causal_flow_attention, flow_attention, flow_start


def operands(L: int = 7, S: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, L, 3, 4), (2, S, 3, 4), (2, S, 3, 5))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def causal(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    start = flow_start(q.shape[0], q.shape[2], q.shape[3], v.shape[3], q)
    return causal_flow_attention(q, k, v, start, **options)[0]


def one_hot(like: Tensor) -> Tensor:
    B, S, H, _ = like.shape
    return torch.eye(S, dtype=like.dtype)[None, :, None].expand(B, S, H, S)


def naive(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """One head of one sequence, [L, D], [S, D], [S, V], by the N x N array of capacities."""
    q, k = q.sigmoid(), k.sigmoid()
    D = q.shape[1]

    def flow(a: Tensor, totals: Tensor) -> Tensor:
        return a @ totals + eps * (a.sum(-1) + totals.sum() + D * eps)

    incoming, outgoing = flow(q, k.sum(0)), flow(k, q.sum(0))
    kept = flow(q, (k / outgoing[:, None]).sum(0))
    given = flow(k, (q / incoming[:, None]).sum(0)).clamp(-1, 1)
    weights = (q @ k.T) / incoming[:, None] * (given.softmax(0) * k.shape[0])
    return (kept * len(q) / len(k)).sigmoid()[:, None] * (weights @ v)


@pytest.mark.parametrize("L, S", [(7, 7), (5, 9), (9, 2)])
def test_is_the_definition(L, S):
    q, k, v = operands(L, S)
    o = flow_attention(q, k, v, eps=1e-3)
    for b in range(2):
        for h in range(3):
            expected = naive(q[b, :, h], k[b, :, h], v[b, :, h], 1e-3)
            assert torch.allclose(o[b, :, h], expected, atol=1e-12)


def test_causal_is_its_definition_token_by_token():
    q, k, v = operands()
    eps = 1e-3
    o = causal(q, k, v, eps=eps)
    for b, h in ((0, 0), (1, 2)):
        qs, ks, vs = q[b, :, h].sigmoid(), k[b, :, h].sigmoid(), v[b, :, h]
        sunk, sourced, numerators, given = torch.zeros(4), torch.zeros(4), torch.zeros(4, 5), []
        sunk, sourced, numerators = (each.double() for each in (sunk, sourced, numerators))
        for t in range(7):
            n = t + 1
            incoming = ((qs[t] + eps) * (ks[:n].sum(0) + eps)).sum() / n
            outgoing = ((ks[t] + eps) * (qs[:n].sum(0) + eps)).sum() / n
            sunk, sourced = sunk + qs[t] / incoming, sourced + ks[t] / outgoing
            kept = ((qs[t] + eps) * (sourced + eps)).sum() / n
            given.append((((ks[t] + eps) * (sunk + eps)).sum() / n).clamp(-1, 1).exp())
            competition = n * given[-1] / sum(given)
            numerators = numerators + ks[t][:, None] * competition * vs[t]
            expected = kept.sigmoid() * (qs[t] / (n * incoming)) @ numerators
            assert torch.allclose(o[b, t, h], expected, atol=1e-12)


def test_flows_are_conserved():
    q, k, _ = operands(6, 9)
    capacity = torch.einsum("bihd,bjhd->bhij", q.sigmoid(), k.sigmoid())
    incoming, outgoing = capacity.sum(-1, keepdim=True), capacity.sum(-2, keepdim=True)
    # With one source no values compete, and what is left of the output is the allocation, which says I'.
    alone = flow_attention(q, k[:, :1], torch.ones(2, 1, 3, 1, dtype=torch.float64), eps=0.0)
    assert torch.allclose((alone.logit() / 6).sum(1), torch.ones(2, 3, 1, dtype=torch.float64), atol=1e-12)
    weights = flow_attention(q, k, one_hot(k), eps=0.0).transpose(1, 2)
    allocation = ((capacity / outgoing).sum(-1) * 6 / 9).sigmoid()
    competition = weights / allocation[..., None] / (capacity / incoming)
    assert torch.allclose(competition, competition[:, :, :1].expand_as(competition), atol=1e-12)
    assert torch.allclose(competition.mean(-1), torch.ones(2, 3, 6, dtype=torch.float64), atol=1e-12)


def test_order_does_not_matter_without_causality():
    q, k, v = operands()
    order = torch.randperm(7)
    assert torch.allclose(flow_attention(q[:, order], k, v), flow_attention(q, k, v)[:, order])
    assert torch.allclose(flow_attention(q, k[:, order], v[:, order]), flow_attention(q, k, v))


def test_equal_queries_and_keys_give_the_allotted_mean():
    q, _, v = operands()
    same = torch.zeros_like(q)
    expected = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)) * v.mean(1, keepdim=True).expand(-1, 7, -1, -1)
    assert torch.allclose(flow_attention(same, same, v, eps=0.0), expected)


def test_the_first_token_reads_itself_allotted():
    q, k, v = operands()
    one = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(causal(q, k, v, eps=0.0)[:, 0], one * v[:, 0])


def test_masks_leave_tokens_out_of_every_sum():
    q, k, v = operands(6, 9)
    sinks, sources = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    sinks[0, 2:4], sources[0, :3] = False, False
    spoiled = [
        each.masked_fill(~mask[..., None, None], torch.nan) for each, mask in ((q, sinks), (k, sources), (v, sources))
    ]
    o = flow_attention(*spoiled, sinks=sinks, sources=sources)
    shorter = flow_attention(q[:1, sinks[0]], k[:1, sources[0]], v[:1, sources[0]])
    assert torch.allclose(o[:1, sinks[0]], shorter)
    assert not bool(o[0, 2:4].any())
    assert torch.allclose(o[1], flow_attention(q, k, v)[1])


def test_long_half_precision_sums_do_not_stall():
    torch.manual_seed(0)
    mixer = create_mixer("flow", dim=8, heads=2)
    x = torch.randn(1, 3000, 8)
    with torch.no_grad():
        exact = mixer(x)[0][0, -1]
        rough = mixer.to(torch.bfloat16)(x.to(torch.bfloat16))[0][0, -1]
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.05


def test_bad_input_is_refused():
    q, k, v = operands(5, 7)
    with pytest.raises(OptionError, match="eps=-1, allowed: >= 0"):
        flow_attention(q, k, v, eps=-1)
    with pytest.raises(OptionError, match="eps=-1.0, allowed: >= 0"):
        create_mixer("flow", dim=8, heads=2, eps=-1.0)
    with pytest.raises(ShapeError, match="N is 5 in q"):
        causal(q, k, v)
    with pytest.raises(ShapeError, match="sources"):
        flow_attention(q, k, v, sources=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(OptionError, match="dim=9 with heads=2, allowed: a multiple"):
        create_mixer("flow", dim=9, heads=2)
