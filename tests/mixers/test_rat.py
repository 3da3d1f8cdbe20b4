"""RAT against its definition, token by token, and its two limits: attention and a recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Rope
from foveate.errors import OptionError
from foveate.mixers.base import create_mixer

DIM, HEADS, D = 16, 4, 4


def made(dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    mixer = create_mixer("rat", dim=DIM, heads=HEADS, **options).to(dtype).eval()
    with torch.no_grad():
        mixer.in_proj.weight.mul_(3)
    return mixer


def tokens(length: int = 13, rows: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def split(mixer, x: Tensor) -> tuple[Tensor, ...]:
    """sigmoid(z), v, g [N, C], and q, k [N, H, D] with the groups repeated in turn, of one sequence."""
    few = mixer.groups * D
    z, v, g, q, k = mixer.in_proj(x)[0].split([DIM, DIM, DIM, few, few], -1)
    head_group = torch.arange(HEADS) % mixer.groups
    q, k = (each.unflatten(-1, (mixer.groups, D))[:, head_group] for each in (q, k))
    return torch.sigmoid(z), v, torch.sigmoid(g + mixer.gate_bias), q, k


def turned(x: Tensor, position: int) -> Tensor:
    """x [H, D] rotated to one position."""
    return Rope(D).rotate(x[None, :, None], torch.tensor([[position]]))[0, :, 0]


def by_definition(mixer, x: Tensor) -> Tensor:
    z, v, g, q, k = split(mixer, x)
    L, outputs, summaries = mixer.chunk, [], []
    for t in range(x.shape[1]):
        if t % L == 0:
            running_k = running_v = torch.zeros(DIM, dtype=x.dtype)
        running_k = g[t] * running_k + (1 - g[t]) * k[t].flatten()
        running_v = g[t] * running_v + (1 - g[t]) * v[t]
        own = turned(running_k.view(HEADS, D), t // L), running_v.view(HEADS, D)
        keys, values = (torch.stack([*(each[n] for each in summaries), own[n]], 1) for n in (0, 1))
        scores = (keys @ turned(q[t], t // L)[..., None])[..., 0] * D**-0.5
        outputs.append((scores.softmax(-1)[:, None] @ values).flatten())
        if t % L == L - 1:
            summaries.append(own)
    return mixer.o_proj(z * torch.stack(outputs))[None]


@pytest.mark.parametrize(("chunk", "groups"), [(1, 2), (4, 1), (5, 2), (13, 4), (64, 2)])
def test_the_layer_is_its_definition(chunk, groups):
    mixer, x = made(chunk=chunk, groups=groups), tokens()
    expected = by_definition(mixer, x)
    assert torch.allclose(mixer(x)[0], expected, atol=1e-12)
    state, outputs = None, []
    with torch.no_grad():
        for token in x.split(1, 1):
            y, state = mixer(token, state=state)
            outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), expected, atol=1e-12)


def test_chunks_of_one_token_are_attention_over_gated_keys_and_values():
    mixer, x = made(chunk=1), tokens()
    z, v, g, q, k = split(mixer, x)
    rope, at = Rope(D), torch.arange(13)[None]
    k, v = ((1 - g) * k.flatten(1)).unflatten(-1, (HEADS, D)), ((1 - g) * v).unflatten(-1, (HEADS, D))
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    o = F.scaled_dot_product_attention(rope.rotate(q, at), rope.rotate(k, at), v, is_causal=True)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(z * o.transpose(1, 2).flatten(2)), atol=1e-12)


def test_one_chunk_is_a_gated_recurrence_without_any_query():
    mixer, x = made(chunk=64), tokens()
    z, v, g, _, _ = split(mixer, x)
    h, rows = torch.zeros(DIM, dtype=torch.float64), []
    for t in range(13):
        h = g[t] * h + (1 - g[t]) * v[t]
        rows.append(h)
    assert torch.allclose(mixer(x)[0], mixer.o_proj(z * torch.stack(rows)), atol=1e-12)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_steps_with_and_without_gradients_agree(length):
    # They read by different routes: one masked call, and a merge of two parts.
    mixer, x = made(chunk=4), tokens()
    _, state = mixer(x[:, :length])
    step = x[:, length : length + 1]
    with torch.no_grad():
        merged, _ = mixer(step, state=state)
    assert torch.allclose(mixer(step, state=state)[0], merged, atol=1e-12)


def test_large_scores_of_the_own_sum_keep_their_digits_in_half_precision():
    # The merge takes the score in float32; the masked call has to hand it over in bfloat16 features.
    mixer, x = made(torch.bfloat16, chunk=4), tokens(32, dtype=torch.bfloat16)
    with torch.no_grad():
        mixer.in_proj.weight[3 * DIM :].mul_(12)
        mixer.o_proj.weight.copy_(torch.eye(DIM))
        state, outputs = None, []
        for token in x.split(1, 1):
            y, state = mixer(token, state=state)
            outputs.append(y)
        merged = torch.cat(outputs, 1).double()
        assert ((mixer(x)[0].double() - merged).norm() / merged.norm()).item() < 1e-3


def test_state_holds_finished_chunks_and_one_running_sum():
    mixer = made(chunk=4)
    for length, finished in ((1, 0), (3, 0), (4, 1), (7, 1), (13, 3)):
        _, state = mixer(tokens(length))
        assert state.keys.shape == state.values.shape == (1, HEADS, finished, D)
        assert state.running.shape == (1, 2, DIM)
        assert state.seen == length


def test_initial_memories_spread_from_one_token_to_the_chunk():
    kept = torch.sigmoid(create_mixer("rat", dim=4096, heads=4, chunk=16).gate_bias)
    memory = kept / (1 - kept)
    assert 0.99 < memory.min() < 1.2
    assert 14.8 < memory.max() < 15.01
    assert not bool(create_mixer("rat", dim=16, heads=4, chunk=1).gate_bias.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "rat: chunk=0, allowed: >= 1"),
        ({"groups": 3}, "rat: groups=3, allowed: divisors of heads = 4"),
        ({"dim": 12}, "rat: dim=12 with heads=4, allowed: a multiple of 8"),
        ({"rope_base": 0.0}, r"rat: rope_base=0\.0, allowed: > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        create_mixer("rat", **{"dim": DIM, "heads": HEADS, **options})
