"""Scans: every prefix of a sequence under an associative operator, in log depth.

semiring_scan     the general one: leaves, operator, identity
elementwise_scan  h_t = exp(g_t) h_{t-1} + x_t                             (HGRN, RAT, RG-LRU, S6)
prefix_softmax    o_t = softmax(scores_1 .. scores_t) v, state (max, sum, weighted sum)    (Aaren)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from foveate.attention.chunks import Chunks, State, read_offsets
from foveate.attention.linear_call import check_log_decay, check_state
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError

Leaves = tuple[Tensor, ...]
Operator = Callable[[Leaves, Leaves], Leaves]

# Tokens scanned in log depth before the state is carried on; longer costs memory, shorter costs loop steps.
_CHUNK = 64


def semiring_scan(leaves: Leaves, op: Operator, identity: Sequence[float], dim: int) -> Leaves:
    """Inclusive prefix scan: out_t = leaf_1 op leaf_2 op ... op leaf_t.

    Args:
        leaves: tensors of one length N along `dim`; together, their entries at t are leaf t.
        op: (earlier, later) -> combined, associative, elementwise along `dim`; need not commute.
        identity: one number per tensor, with x op identity = x; it fills odd lengths.
        dim: the axis to scan.
    Returns:
        tensors shaped like the leaves. Gradients flow through `op`.
    Raises:
        ShapeError for leaves of different lengths; OptionError for an identity of another length.
    Cost: about 2 N applications of `op` in 2 log2(N) calls.
    """
    leaves = tuple(leaves)
    if len(identity) != len(leaves):
        raise OptionError(f"identity has {len(identity)} numbers for {len(leaves)} leaves, allowed: one for each")
    lengths = {leaf.shape[dim] for leaf in leaves}
    if len(lengths) != 1:
        raise ShapeError(f"the leaves have lengths {sorted(lengths)} along axis {dim}, allowed: one length")
    if 0 in lengths:
        return leaves
    moved = tuple(leaf.movedim(dim, 0) for leaf in leaves)
    return tuple(each.movedim(0, dim) for each in _scan(moved, op, tuple(identity)))


def _scan(leaves: Leaves, op: Operator, identity: tuple[float, ...]) -> Leaves:
    n = leaves[0].shape[0]
    if n == 1:
        return leaves
    if n % 2:
        fill = (leaf.new_full((1, *leaf.shape[1:]), e) for leaf, e in zip(leaves, identity))
        leaves = tuple(torch.cat(pair) for pair in zip(leaves, fill))
    first = tuple(leaf[0::2] for leaf in leaves)
    second = tuple(leaf[1::2] for leaf in leaves)
    odd = _scan(op(first, second), op, identity)
    even = first
    if n > 2:
        rest = op(tuple(each[:-1] for each in odd), tuple(each[1:] for each in first))
        even = tuple(torch.cat([head[:1], tail]) for head, tail in zip(first, rest))
    return tuple(torch.stack(pair, 1).flatten(0, 1)[:n] for pair in zip(even, odd))


def _carried_scan(
    chunks: Chunks, leaves: Leaves, op: Operator, identity: Sequence[float], start: State
) -> tuple[Leaves, State]:
    """`semiring_scan` over axis 1 of [B, T, ...] in chunks, each sequence from its own row of `start`."""
    cut = tuple(chunks.split(leaf, fill) for leaf, fill in zip(leaves, identity))
    inside = semiring_scan(cut, op, identity, 1)

    before: list[State] = []

    def advance(rows: slice, state: State) -> State:
        before.append(state)
        return op(state, tuple(each[rows, -1] for each in inside))

    final = chunks.walk(start, advance)
    carried = tuple(torch.cat(parts).unsqueeze(1) for parts in zip(*before))
    whole = op(carried, inside)
    return tuple(chunks.join(each) for each in whole), final


def _affine(a: Leaves, b: Leaves) -> Leaves:
    """(A, x) stands for h -> A h + x."""
    return a[0] * b[0], b[0] * a[1] + b[1]


def elementwise_scan(
    x: Tensor,
    g: Tensor,
    *,
    initial_state: Tensor | None = None,
    reset_every: int | None = None,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(g_t) h_{t-1} + x_t, each channel on its own.

    Args:
        x, g: [B, T, ...], g natural log, <= 0 (-inf forgets all).
        initial_state: [N, ...], the state before the first token; default 0.
        reset_every: the state is 0 before every token whose position offset + t is a multiple of this, other than
            position 0, which reads the initial state. Default: never.
        offset: tokens of the sequences that earlier calls have seen; matters only to `reset_every`.
        cu_seqlens: [N + 1], boundaries of sequences packed into B = 1.
    Returns:
        h [B, T, ...] in x's dtype; the last state [N, ...] float32 (float64 for float64 inputs). An empty sequence
        returns its initial state.
    Raises:
        ShapeError, OptionError (g > 0, reset_every < 1, offset < 0), StateError.
    Cost: O(T) work per channel, in log2(64) + T / 64 dependent steps.
    """
    if x.shape != g.shape or x.dim() < 2:
        raise ShapeError(f"x {list(x.shape)} and g {list(g.shape)}, allowed: one shape [B, T, ...]")
    B, T, *rest = x.shape
    if T == 0:
        raise ShapeError(f"x {list(x.shape)} has T = 0, allowed: at least one token")
    if offset < 0 or (reset_every is not None and reset_every < 1):
        raise OptionError(f"reset_every={reset_every}, offset={offset}, allowed: >= 1 and >= 0")
    check_log_decay(g, "g")
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, T)
    N = B if offsets is None else len(offsets) - 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if initial_state is None:
        h0 = x.new_zeros(N, *rest, dtype=dtype)
    else:
        check_state(initial_state, (N, *rest), "N, ...")
        h0 = initial_state.to(dtype)
    decay, x_in = g.to(dtype).exp(), x.to(dtype)
    last = None
    if reset_every is not None:
        offsets = offsets or tuple(range(0, B * T + 1, T))
        decay, x_in = decay.flatten(0, 1)[None], x_in.flatten(0, 1)[None]
        offsets, h0, last = _cut_at_resets(offsets, h0, reset_every, offset)
    chunks = Chunks.cut(decay.shape[0], decay.shape[1], _CHUNK, offsets, x.device)
    (_, h), (_, final) = _carried_scan(chunks, (decay, x_in), _affine, (1.0, 0.0), (torch.ones_like(h0), h0))
    return h.view(x.shape).to(x.dtype), (final if last is None else final[last])


def _cut_at_resets(
    offsets: tuple[int, ...], h0: Tensor, every: int, offset: int
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Boundaries with the resets among them, the states before all pieces, and each sequence's last piece."""
    bounds = [0]
    sources: list[int] = []
    last: list[int] = []
    for n, (start, end) in enumerate(pairwise(offsets)):
        # Position 0 reads the initial state; at any later multiple of `every` it is forgotten.
        forgotten = end > start and offset > 0 and offset % every == 0
        pieces = [*range(start + every - offset % every, end, every), end]
        bounds += pieces
        sources += [-1 if forgotten else n] + [-1] * (len(pieces) - 1)
        last.append(len(sources) - 1)
    source = torch.tensor(sources, device=h0.device)
    mask = (source < 0).reshape(-1, *[1] * (h0.dim() - 1))
    return tuple(bounds), h0[source.clamp(min=0)].masked_fill(mask, 0), torch.tensor(last, device=h0.device)


def softmax_merge(a: Leaves, b: Leaves) -> Leaves:
    """Combine softmax states (m, u, w): m = max score, u = sum exp(s - m), w = sum exp(s - m) v [..., V].

    Associative; the identity is (-inf, 0, 0), and -inf with -inf gives it again. m carries no gradient: it cancels.
    """
    m = torch.maximum(a[0], b[0]).detach()
    reference = torch.where(m == -torch.inf, 0, m)
    left, right = (a[0] - reference).exp(), (b[0] - reference).exp()
    w = a[2] * left.unsqueeze(-1) + b[2] * right.unsqueeze(-1)
    return m, a[1] * left + b[1] * right, w


def prefix_softmax(
    scores: Tensor,
    v: Tensor,
    *,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Softmax attention of one fixed query over every prefix: o_t = softmax(scores_1 .. scores_t) v (arXiv 2405.13956).

    Args:
        scores: [B, T, H], already scaled; -inf hides a token.    v: [B, T, H, V].
        initial_state: (m [N, H], u [N, H], w [N, H, V]) of the tokens before; default: none.
        cu_seqlens: [N + 1], boundaries of sequences packed into B = 1.
    Returns:
        o [B, T, H, V] in v's dtype, 0 where nothing is visible yet; the state after the last token, float32
        (float64 for float64 inputs).
    Raises:
        ShapeError, StateError.
    Cost: O(T V) per head and O(1) state.
    """
    sizes = match(scores=(scores, "B T H"), v=(v, "B T H V"))
    B, T, H, V = (sizes[letter] for letter in "BTHV")
    if T == 0:
        raise ShapeError(f"scores {list(scores.shape)} has T = 0, allowed: at least one token")
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, T)
    N = B if offsets is None else len(offsets) - 1
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    s, values = scores.to(dtype), v.to(dtype)
    if initial_state is None:
        start: State = (s.new_full((N, H), -torch.inf), s.new_zeros(N, H), s.new_zeros(N, H, V))
    else:
        for each, shape in zip(initial_state, ((N, H), (N, H), (N, H, V)), strict=True):
            check_state(each, shape, "N, H" if len(shape) == 2 else "N, H, V")
        start = tuple(each.to(dtype) for each in initial_state)
    leaves = (s, torch.ones_like(s), values)
    chunks = Chunks.cut(B, T, _CHUNK, offsets, v.device)
    (_, u, w), final = _carried_scan(chunks, leaves, softmax_merge, (-torch.inf, 0.0, 0.0), start)
    return (w / torch.where(u == 0, 1, u).unsqueeze(-1)).to(v.dtype), final
