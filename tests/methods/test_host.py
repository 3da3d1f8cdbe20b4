"""The host tier against plain indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.errors import FoveateError, HostMemoryError, ShapeError, StateError
from foveate.methods import host
from foveate.methods.cache import LayerCache
from foveate.methods.host import HostTier, available_bytes


def draw(tokens: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, tokens, 8), torch.randn(batch, heads, tokens, 4)


def test_gather_gives_the_rows_that_were_put_and_appended() -> None:
    k, v = draw(30)
    tier = HostTier.put(k[:, :, :11], v[:, :, :11])
    for t in range(11, 30):
        tier.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    index = torch.randint(0, 30, (2, 3, 7))
    keys, values = tier.gather(index)
    spread = index[..., None]
    assert torch.equal(keys, k.gather(2, spread.expand(-1, -1, -1, 8)))
    assert torch.equal(values, v.gather(2, spread.expand(-1, -1, -1, 4)))
    assert tier.length.tolist() == [30, 30]


def test_query_heads_of_a_group_read_their_kv_head() -> None:
    k, v = draw(9)
    index = torch.randint(0, 9, (2, 6, 4))
    keys, values = HostTier.put(k, v).gather(index)
    for b in range(2):
        for h in range(6):
            assert torch.equal(keys[b, h], k[b, h // 2, index[b, h]])
            assert torch.equal(values[b, h], v[b, h // 2, index[b, h]])


def test_what_is_put_is_a_copy() -> None:
    k, v = draw(5)
    expected = k.clone()
    tier = HostTier.put(k, v)
    k.zero_()
    assert torch.equal(tier.gather(torch.arange(5).expand(2, 3, -1))[0], expected)


def test_sequences_of_different_length_and_absent_entries() -> None:
    k, v = draw(6)
    tier = HostTier.put(k, v, torch.tensor([6, 2]))
    tier.append(k[:, :, 3:5], v[:, :, 3:5], torch.tensor([0, 2]))
    assert tier.length.tolist() == [6, 4]
    index = torch.tensor([[5, -1, 0], [3, 1, -1]])[:, None].expand(-1, 3, -1)
    keys, _ = tier.gather(index)
    assert torch.equal(keys[0, :, 0], k[0, :, 5])
    assert torch.equal(keys[1, :, 0], k[1, :, 4])
    assert torch.equal(keys[1, :, 1], k[1, :, 1])
    assert not keys[0, :, 1].any()
    assert not keys[1, :, 2].any()


def test_an_empty_tier_gathers_nothing_but_zeros() -> None:
    k, v = draw(0)
    keys, values = HostTier.put(k, v).gather(torch.full((2, 3, 4), -1))
    assert keys.shape == (2, 3, 4, 8)
    assert not keys.any()
    assert not values.any()


def test_pieces_are_all_rows_and_hide_what_was_never_written() -> None:
    k, v = draw(10)
    tier = HostTier.put(k, v, torch.tensor([10, 4]))
    tier.keys[1, :, 4:] = torch.nan
    tier.values[1, :, 4:] = torch.nan
    starts, keys, values = zip(*tier.pieces(4))
    assert starts == (0, 4, 8)
    together = torch.cat(keys, 2)
    assert torch.equal(together[0], k[0])
    assert torch.equal(together[1, :, :4], k[1, :, :4])
    assert not together[1, :, 4:].any()
    assert not torch.cat(values, 2)[1, :, 4:].any()


def test_reorder_repeats_and_drops_sequences() -> None:
    k, v = draw(6, batch=3)
    tier = HostTier.put(k, v, torch.tensor([6, 5, 4])).reorder(torch.tensor([2, 0, 0, 2]))
    assert tier.length.tolist() == [4, 6, 6, 4]
    assert torch.equal(tier.gather(torch.zeros(4, 3, 1, dtype=torch.int64))[0][:, :, 0], k[[2, 0, 0, 2], :, 0])
    tier.append(k[[0, 1, 2, 0], :, :1], v[[0, 1, 2, 0], :, :1])
    last = (tier.length - 1)[:, None, None].expand(-1, 3, 1)
    assert torch.equal(tier.gather(last)[0][:, :, 0], k[[0, 1, 2, 0], :, 0])


def test_a_tier_in_a_layers_state_follows_the_batch_and_is_counted() -> None:
    k, v = draw(6)
    cache = LayerCache()
    cache.append(k, v)
    before = cache.bytes()
    tier = HostTier.put(k, v, torch.tensor([6, 3]))
    cache.states[0] = tier
    assert cache.bytes() == before + tier.bytes().cold + tier.length.numel() * 8
    cache.select_batch(torch.tensor([1, 1, 0]))
    held = cache.states[0]
    assert held.length.tolist() == [3, 3, 6]
    assert torch.equal(held.gather(torch.full((3, 3, 1), 2))[1][:, :, 0], v[[1, 1, 0], :, 2])


def test_bytes_tell_hot_from_cold() -> None:
    k, v = draw(100)
    tier = HostTier.put(k, v)
    assert tier.bytes().hot == 0
    assert tier.bytes().cold >= 2 * 3 * 100 * 12 * 4
    tier.gather(torch.zeros(2, 3, 5, dtype=torch.int64))
    assert tier.bytes().hot == 2 * 3 * 5 * 12 * 4


def test_growth_is_by_a_little() -> None:
    k, v = draw(6400, batch=1, heads=1)
    assert HostTier.put(k, v).bytes().cold <= 6400 * 12 * 4 * 1.02


def test_over_the_limit_is_refused_and_changes_nothing() -> None:
    k, v = draw(32)
    with pytest.raises(HostMemoryError, match=r"needed for \d+ cold keys and values of 2 sequences, allowed: 100"):
        HostTier.put(k, v, limit=100)
    tier = HostTier.put(k, v, limit=2 * 3 * 60 * 12 * 4)
    expected = tier.gather(torch.arange(32).expand(2, 3, -1))[0]
    with pytest.raises(HostMemoryError, match="raise the limit"):
        tier.append(k, v)
    assert tier.length.tolist() == [32, 32]
    assert torch.equal(tier.gather(torch.arange(32).expand(2, 3, -1))[0], expected)
    assert issubclass(HostMemoryError, FoveateError)
    assert issubclass(HostMemoryError, MemoryError)


def test_more_than_the_machine_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(HostMemoryError, match="the host has 1000 left"):
        HostTier.put(*draw(32))


def test_a_refusal_of_the_allocator_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell what it has, the allocator decides: here on a buffer of 2^57 bytes."""
    monkeypatch.setattr(host, "available_bytes", lambda: None)
    tier = HostTier.put(*draw(4))
    with pytest.raises(HostMemoryError, match="the allocator refused"):
        tier._grow(2**52)
    assert tier.length.tolist() == [4, 4]


def test_the_system_says_what_is_available() -> None:
    free = available_bytes()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(
    "keys, values, message",
    [
        ((2, 3, 1, 7), (2, 3, 1, 4), "new keys .* allowed: .2, 3, M, 8."),
        ((1, 3, 1, 8), (1, 3, 1, 4), "new keys"),
        ((2, 3, 1, 8), (2, 3, 1, 8), "new values"),
        ((2, 3, 1, 8), (2, 3, 2, 4), "1 new keys and 2 new values"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(keys: tuple[int, ...], values: tuple[int, ...], message: str) -> None:
    tier = HostTier.put(*draw(3))
    with pytest.raises(ShapeError, match=message):
        tier.append(torch.zeros(keys), torch.zeros(values))


def test_other_dtype_counts_and_indexes_are_refused() -> None:
    k, v = draw(3)
    tier = HostTier.put(k, v)
    with pytest.raises(ShapeError, match="bfloat16, allowed: .* torch.float32"):
        tier.append(k.bfloat16(), v)
    with pytest.raises(ShapeError, match="counts .4, 0., allowed: one of 0 to 3"):
        tier.append(k, v, torch.tensor([4, 0]))
    with pytest.raises(ShapeError, match="allowed: .2, a multiple of 3, K."):
        tier.gather(torch.zeros(2, 4, 1, dtype=torch.int64))
    with pytest.raises(StateError, match="row 3 is not held, allowed: below .3, 3. per sequence"):
        tier.gather(torch.full((2, 3, 1), 3))


@pytest.mark.gpu
def test_on_a_gpu_buffers_are_page_locked_and_gathered_rows_are_there() -> None:
    k, v = (x.cuda() for x in draw(20))
    tier = HostTier.put(k, v)
    assert tier.keys.is_pinned()
    assert tier.keys.device.type == "cpu"
    tier.append(k[:, :, :1], v[:, :, :1])
    keys, _ = tier.gather(torch.arange(21).expand(2, 3, -1).cuda())
    assert keys.is_cuda
    assert torch.equal(keys, torch.cat((k, k[:, :, :1]), 2))
    assert tier.reorder(torch.tensor([1, 0])).keys.is_pinned()
