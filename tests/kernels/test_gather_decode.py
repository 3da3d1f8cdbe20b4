"""gather_decode and merge_lse against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import gather_decode as module
from foveate.attention.backends.triton.gather_decode import gather_decode
from foveate.attention.backends.triton.merge import merge_lse
from foveate.errors import ShapeError
from tests.kernels.definitions import DEVICE, GATES, attention, causal_counts, error, lse_error


def draw(B=1, Hq=4, Hkv=2, M=1, N=130, D=64, DV=None, dtype=torch.float32, size=1.0):
    shapes = ((B, Hq, M, D), (B, Hkv, N, D), (B, Hkv, N, DV or D))
    return tuple((size * torch.randn(shape, device=DEVICE)).to(dtype) for shape in shapes)


def check(got, want, dtype=torch.float32):
    o, lse = got
    assert error(o, want[0]) <= GATES[dtype]
    assert lse_error(lse, want[1]) <= 2e-3


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every buffer that the launcher asks for starts as NaN."""

    def empty(*size, **options):
        return torch.full(size[0] if isinstance(size[0], tuple | list) else size, float("nan"), **options)

    class Poisoned:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(module, "torch", Poisoned())


@pytest.mark.parametrize("n", [1, 15, 63, 65, 127, 1000])
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_all_keys(n, splits):
    q, k, v = draw(N=n)
    check(gather_decode(q, k, v, num_splits=splits), attention(q, k, v, causal_counts(1, 4, 1, n)))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 5, 16])
def test_groups_and_queries(group, m):
    q, k, v = draw(B=2, Hq=2 * group, M=m, N=70, D=32)
    check(gather_decode(q, k, v), attention(q, k, v, causal_counts(2, 2 * group, m, 70)))


@pytest.mark.parametrize("dim, dim_v", [(32, 32), (80, 80), (64, 128), (192, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_dtypes(dim, dim_v, dtype):
    q, k, v = draw(N=90, D=dim, DV=dim_v, dtype=dtype)
    check(gather_decode(q, k, v), attention(q, k, v, causal_counts(1, 4, 1, 90)), dtype)


def tokens_to_counts(index, length, Hq, M, N):
    B, H, K = index.shape
    counts = torch.zeros(B, H, N)
    for b in range(B):
        for h in range(H):
            used = K if length is None else int(length[b, h])
            for j in index[b, h, :used].tolist():
                if 0 <= j < N:
                    counts[b, h, j] += 1
    counts = counts.repeat_interleave(Hq // H, 1)[:, :, None].to(DEVICE)
    return counts * causal_counts(B, Hq, M, N)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("with_length", [False, True])
def test_tokens(kind, m, with_length):
    q, k, v = draw(B=2, M=m, N=300)
    index = torch.randint(-20, 330, (2, 2, 117), dtype=kind, device=DEVICE)
    index[1, 0] = -1
    length = torch.tensor([[117, 3], [50, 0]], dtype=torch.int32, device=DEVICE) if with_length else None
    unread = torch.ones(300, dtype=torch.bool, device=DEVICE)
    unread[index[(index >= 0) & (index < 300)].long()] = False
    k[:, :, unread], v[:, :, unread] = float("nan"), float("nan")
    counts = tokens_to_counts(index, length, 4, m, 300)
    want = attention(q, k.nan_to_num(0.0), v, counts)
    got = gather_decode(q, k, v, index=index, length=length)
    check(got, want)
    assert got[1][1, :2].eq(-torch.inf).all()
    assert got[0][1, :2].eq(0).all()


def test_one_list_for_all_heads_and_sequences():
    q, k, v = draw(B=2, N=100)
    index = torch.randperm(100, device=DEVICE)[:40][None, None]
    counts = tokens_to_counts(index.expand(2, 2, -1), None, 4, 1, 100)
    check(gather_decode(q, k, v, index=index), attention(q, k, v, counts))


@pytest.mark.parametrize("page", [4, 16])
def test_pages(page):
    n = 205
    q, k, v = draw(M=2, N=n)
    last = -(-n // page)
    index = torch.stack([torch.randperm(last, device=DEVICE)[:9] for _ in range(2)])[None]
    index[0, 1, 4] = -1
    index[0, 0, 2] = last - 1
    tokens = (index[..., None] * page + torch.arange(page, device=DEVICE)).masked_fill(index[..., None] < 0, -1)
    counts = tokens_to_counts(tokens.flatten(2), None, 4, 2, n)
    check(gather_decode(q, k, v, index=index, page_size=page), attention(q, k, v, counts))


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("n, window, sinks", [(200, 63, 4), (200, 0, 1), (50, 100, 4), (5, 2, 8), (90, 20, 0)])
def test_window_with_sinks(m, n, window, sinks):
    q, k, v = draw(M=m, N=n)
    counts = causal_counts(1, 4, m, n, window, sinks)
    check(gather_decode(q, k, v, window=window, sinks=sinks), attention(q, k, v, counts))


def test_window_reads_only_its_range():
    q, k, v = draw(N=400)
    k[:, :, 4:336], v[:, :, 4:336] = float("nan"), float("nan")
    counts = causal_counts(1, 4, 1, 400, 63, 4)
    check(gather_decode(q, k, v, window=63, sinks=4), attention(q, k.nan_to_num(0.0), v, counts))


def test_lengths_of_a_static_cache():
    q, k, v = draw(B=3, M=2, N=256)
    length = torch.tensor([[256, 100], [2, 65], [130, 7]], device=DEVICE)
    counts = torch.zeros(3, 4, 2, 256, device=DEVICE)
    for b in range(3):
        for h in range(4):
            used = int(length[b, h // 2])
            counts[b, h, :, :used] = causal_counts(1, 1, 2, used)[0, 0]
            k[b, h // 2, used:], v[b, h // 2, used:] = float("nan"), float("nan")
    check(gather_decode(q, k, v, length=length), attention(q, k.nan_to_num(0.0), v, counts))


@pytest.mark.parametrize("splits", [None, 7, 40])
@pytest.mark.parametrize("window", [None, 30])
def test_packed_segments(splits, window):
    lengths = [[200, 0, 33], [1, 64, 500]]
    flat = [n for row in lengths for n in row]
    start = torch.tensor([sum(flat[:i]) + 3 * i for i in range(6)], device=DEVICE)
    q = torch.randn(2, 6, 1, 64, device=DEVICE)
    k, v = torch.full((2, 830, 64), float("nan"), device=DEVICE)
    want_o, want_lse = torch.zeros(2, 6, 1, 64).to(q).double(), torch.full((2, 6, 1), -torch.inf).to(q).double()
    for s, n in enumerate(flat):
        part = slice(int(start[s]), int(start[s]) + n)
        k[part], v[part] = torch.randn(n, 64), torch.randn(n, 64)
        if n:
            b, h = divmod(s, 3)
            heads = slice(2 * h, 2 * h + 2)
            counts = causal_counts(1, 2, 1, n, window)
            o, lse = attention(q[b : b + 1, heads], k[None, None, part], v[None, None, part], counts)
            want_o[b, heads], want_lse[b, heads] = o[0], lse[0]
    length = torch.tensor(lengths, device=DEVICE)
    got = gather_decode(q, k, v, start=start, length=length, num_splits=splits, window=window)
    check(got, (want_o, want_lse))


def test_sink_softcap_and_log_weight():
    q, k, v = draw(M=2, N=140, size=2.0)
    sink, log_weight = torch.randn(4, device=DEVICE), torch.randn(1, 2, 140, device=DEVICE)
    counts = causal_counts(1, 4, 2, 140)
    options = {"sink": sink, "softcap": 5.0, "log_weight": log_weight, "scale": 0.3}
    for splits in (1, 4):
        check(gather_decode(q, k, v, num_splits=splits, **options), attention(q, k, v, counts, **options))


def test_a_sink_alone_takes_all_weight():
    q, k, v = draw(N=64)
    index = torch.full((1, 2, 9), -1, device=DEVICE)
    sink = torch.randn(4, device=DEVICE)
    o, lse = gather_decode(q, k, v, index=index, sink=sink)
    assert o.eq(0).all()
    assert lse_error(lse, sink.double()[None, :, None]) < 1e-6


def test_positions_with_holes_and_a_padding_query():
    q, k, v = draw(B=2, M=2, N=100)
    k_positions = torch.stack([torch.randperm(400, device=DEVICE)[:100] for _ in range(4)]).view(2, 2, 100)
    k_positions[:, :, ::7] = -1
    q_positions = torch.tensor([[150, 300], [-1, 200]], device=DEVICE)
    at = k_positions.repeat_interleave(2, 1)[:, :, None]
    q_at = q_positions[:, None, :, None]
    counts = ((at >= 0) & (q_at >= 0) & (at <= q_at) & (q_at - at <= 180)).double()
    got = gather_decode(q, k, v, k_positions=k_positions, q_positions=q_positions, window=180)
    check(got, attention(q, k, v, counts))
    assert got[0][1, :, 0].eq(0).all()


def test_strided_and_expanded_inputs():
    q, k, v = draw(B=2, N=90)
    q2 = torch.randn(2, 1, 4, 64, device=DEVICE).transpose(1, 2)
    q2.copy_(q)
    k2 = torch.randn(2, 90, 2, 64, device=DEVICE).transpose(1, 2)
    k2.copy_(k)
    v2 = v[:1, :1].expand(2, 2, -1, -1)
    check(gather_decode(q2, k2, v2), attention(q, k, v2, causal_counts(2, 4, 1, 90)))


def test_large_scores_and_repeatability():
    q, k, v = draw(N=200, size=1.0)
    options = {"scale": 60 / (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max().item()}
    got = gather_decode(q, k, v, **options)
    check(got, attention(q, k, v, causal_counts(1, 4, 1, 200), **options))
    again = gather_decode(q, k, v, **options)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])


def test_bad_input_is_named():
    q, k, v = draw()
    with pytest.raises(ShapeError, match="last stride"):
        gather_decode(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v)
    with pytest.raises(ShapeError, match="float16"):
        gather_decode(q, k.half(), v)
    with pytest.raises(ShapeError, match="does not fit"):
        gather_decode(q, k[..., :32], v)
    with pytest.raises(ShapeError, match="start and length"):
        gather_decode(q, k[0, 0], v[0, 0])
    with pytest.raises(ShapeError, match="besides a window"):
        gather_decode(q, k, v, sinks=4)


def test_merge_of_parts_with_empty_ones():
    o, lse = torch.randn(5, 2, 3, 7, 40, device=DEVICE), torch.randn(5, 2, 3, 7, device=DEVICE)
    lse[1], lse[:, 0, 1] = -torch.inf, -torch.inf
    o[1] = float("nan")
    total = lse.double().logsumexp(0)
    weights = torch.exp(lse.double() - total.masked_fill(total == -torch.inf, 0.0))[..., None]
    want = (weights * o.double().nan_to_num(0.0)).sum(0)
    check(merge_lse(o, lse), (want, total))
