"""The dense mixer against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError, UnknownNameError
from foveate.mixers.base import create_mixer


def definition(mixer, x: Tensor, window: int | None = None, shift: int = 0) -> Tensor:
    """Scores token by token and pair by pair, with complex numbers for the rotation."""
    N, H, D = x.shape[1], mixer.heads, mixer.head_dim
    q, k, v = ((x[0] @ p.weight.T).view(N, -1, D) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    rates = 10000.0 ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)

    def rotated(vector: Tensor, position: int) -> Tensor:
        pairs = torch.complex(vector[: D // 2], vector[D // 2 :])
        turned = pairs * torch.exp(1j * (position + shift) * rates)
        return torch.cat((turned.real, turned.imag))

    rows = []
    for i in range(N):
        heads = []
        for h in range(H):
            g = h // (H // mixer.kv_heads)
            read = [j for j in range(i + 1) if window is None or i - j <= window]
            scores = torch.stack([rotated(q[i, h], i) @ rotated(k[j, g], j) for j in read]) / D**0.5
            heads.append(scores.softmax(0) @ v[read, g])
        rows.append(torch.cat(heads) @ mixer.o_proj.weight.T)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 0, 3, 100])
def test_equals_the_definition(kv_heads, window):
    torch.manual_seed(0)
    mixer = create_mixer("softmax", dim=16, heads=4, kv_heads=kv_heads, window=window).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert torch.allclose(mixer(x)[0], definition(mixer, x, window), atol=1e-12)


def test_a_common_shift_of_positions_changes_nothing():
    torch.manual_seed(0)
    mixer = create_mixer("softmax", dim=16, heads=2).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    at = torch.arange(9)[None] + 1000
    y, state = mixer(x[:, :6], positions=at[:, :6])
    rest, state = mixer(x[:, 6:], state=state)
    assert torch.allclose(torch.cat((y, rest), 1), mixer(x)[0], atol=1e-9)
    assert state.position.tolist() == [1009]


def test_packed_sequences_may_say_where_they_stand():
    torch.manual_seed(0)
    mixer = create_mixer("softmax", dim=16, heads=2).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    at = torch.tensor([[7, 8, 3, 4, 5]])
    _, state = mixer(x, positions=at, cu_seqlens=torch.tensor([0, 0, 2, 2, 5]))
    assert state.position.tolist() == [0, 9, 0, 6]
    alone, _ = mixer(x[:, 2:], positions=at[:, 2:])
    assert torch.allclose(mixer(x, positions=at, cu_seqlens=torch.tensor([0, 2, 5]))[0][:, 2:], alone)
    real = torch.tensor([[False, True, True, False, True]])
    assert mixer(x, positions=at, padding=real)[1].position.tolist() == [6]


def test_positions_matter():
    torch.manual_seed(0)
    mixer = create_mixer("softmax", dim=16, heads=2).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    spread = mixer(x, positions=torch.arange(5)[None] * 2)[0]
    assert not torch.allclose(spread, mixer(x)[0])
    assert torch.allclose(create_mixer("softmax:rotary=false", dim=16, heads=2).double()(x * 0)[0], torch.zeros_like(x))


def test_a_window_state_is_bounded_and_frees_the_prompt():
    mixer = create_mixer("softmax:window=4", dim=16, heads=2)
    _, state = mixer(torch.randn(2, 50, 16))
    assert mixer.constant_state
    assert state.keys.shape[2] == 4
    assert state.keys.untyped_storage().nbytes() == state.keys.numel() * 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("softmax:kv_heads=3", "kv_heads=3, allowed: divisors of 4"),
        ("softmax:window=-1", "window=-1, allowed: >= 0"),
        ("softmax:head_dim=3", "head_dim=3, allowed with rotary: even"),
        ("softmax:window=2,causal=false", "window with causal=False"),
        ("softmax:window=wide", "window='wide', allowed: a value of type int"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(OptionError, match=message):
        create_mixer(spec, dim=16, heads=4)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="there is no mixer 'softmaxx'; did you mean softmax"):
        create_mixer("softmaxx", dim=16)
    with pytest.raises(UnknownNameError, match="softmax has no option 'windows'; did you mean window"):
        create_mixer("softmax:windows=3", dim=16)
    with pytest.raises(UnknownNameError, match="there is no mixer 'snapkv'"):
        create_mixer("snapkv", dim=16)
