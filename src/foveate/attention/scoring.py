"""Scores of one query per head against many keys, the best of many scores, and the rows they choose: what every
selection starts from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.backends import cpp_scoring, cpp_votes
from foveate.attention.backends.torch_dense import gather_rows
from foveate.attention.backends.triton import availability
from foveate.attention.byte_keys import ByteKeys
from foveate.attention.merge import merge
from foveate.attention.positions import Positions
from foveate.attention.shapes import match
from foveate.attention.softmax import attend
from foveate.errors import OptionError, ShapeError


def query_scores(q: Tensor, k: Tensor) -> Tensor:
    """Unscaled q . k of q [B, Hq, D] with k [B, Hkv, N, D]: [B, Hq, N] float32 (float64 for float64).

    On CPU without the C++ kernel one product per KV head: batched products of so few rows are 10 times slower in
    bfloat16 (11.3 against 1.2 ms at Hq 9, Hkv 3, N 32k, D 64; one core of a shared Zen 4, torch 2.13).
    """
    match(q=(q, "B Hq D"), k=(k, "B Hkv N D"))
    B, Hq, D = q.shape
    H, N = k.shape[1], k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(B, H, Hq // H, D)
    if q.device.type != "cpu":
        return (rows @ k.transpose(-1, -2)).to(exact).view(B, Hq, N)
    if cpp_scoring.why_not(rows, k) is None:
        return cpp_scoring.scores(rows, k)
    scores = torch.empty(B, H, Hq // H, N, dtype=exact)
    for b in range(B):
        for h in range(H):
            scores[b, h] = torch.nn.functional.linear(rows[b, h], k[b, h])
    return scores.view(B, Hq, N)


def softmax_votes(q: Tensor, k: Tensor, scale: float, *, groups: int = 1, reduce: str = "sum") -> Tensor:
    """Softmax weights over all keys, of scale q . k, reduced over query heads: [B, groups, N] float32.

    q: [B, Hq, D], k: [B, Hkv, N, D] (float64 gives float64). scale: above 0. groups: consecutive query heads in so many
    groups of one size, each reduced for itself: 1 takes all heads together, Hkv those of each KV head. reduce: "sum"
    or "max". Raises ShapeError, OptionError. O(N Hq D) time, O(N Hq) memory; the C++ kernel reads k once.
    """
    match(q=(q, "B Hq D"), k=(k, "B Hkv N D"))
    B, Hq, D = q.shape
    if not scale > 0 or reduce not in ("sum", "max") or groups < 1 or Hq % groups:
        raise OptionError(
            f"softmax_votes: scale={scale}, reduce={reduce!r}, groups={groups}, allowed: scale > 0, 'sum' or 'max', "
            f"a number of groups that divides {Hq} query heads"
        )
    rows = q.reshape(B, k.shape[1], -1, D)
    if cpp_scoring.why_not(rows, k) is None:
        return cpp_scoring.votes(rows, k, scale, groups, reduce == "max")
    weights = query_scores(q, k).mul_(scale).softmax(-1).unflatten(1, (groups, -1))
    return weights.sum(2) if reduce == "sum" else weights.amax(2)


def voted_slots(
    q: Tensor, k: Tensor | ByteKeys, scale: float, *, first: int, last: int, count: int, kernel: int = 1
) -> Tensor:
    """The first slots, and the `count` between them and the last ones that all query heads vote for most
    (`softmax_votes` over those between): int64 [B, first + count], ascending; ties go to the lower slot.

    q: [B, Hq, D], k: [B, Hkv, N, D], in their own type or coded; count: at most N - first - last.
    kernel: odd width over which votes are max-pooled. Votes that are not numbers choose the lowest slots. Raises
    ShapeError, OptionError. O(N Hq D).
    """
    N = match(q=(q, "B Hq D"), k=(k.codes if isinstance(k, ByteKeys) else k, "B Hkv N D"))["N"]
    if not scale > 0 or min(first, last, count) < 0 or count > N - first - last:
        raise OptionError(
            f"voted_slots: scale={scale}, first={first}, last={last}, count={count}, allowed: scale > 0, numbers >= 0 "
            f"of {N} keys together"
        )
    if isinstance(k, ByteKeys):
        coded = k.between(first, N - last)
        if kernel == 1 and cpp_votes.why_not(q, coded.codes) is None:
            return cpp_votes.choose(coded.scaled(q), coded.codes, coded.step, scale, first, count)
        votes = coded.scores(q).mul_(scale).softmax(-1).sum(1, keepdim=True)
    else:
        middle = k[:, :, first : N - last]
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        if kernel == 1 and cpp_scoring.why_not(rows, middle) is None:
            return cpp_scoring.choose(rows, middle, scale, first, count)
        votes = softmax_votes(q, middle, scale)
    if kernel > 1:
        votes = torch.nn.functional.max_pool1d(votes, kernel, stride=1, padding=kernel // 2)
    chosen = top_slots(votes.nan_to_num(), count)[:, 0] + first
    return torch.cat((torch.arange(first, device=q.device).expand(q.shape[0], -1), chosen), 1)


def top_mask(scores: Tensor, count: int | Tensor) -> Tensor:
    """Bool like scores [..., N]: the `count` highest of each row; ties go to the lower index.

    count: an int, or a tensor that broadcasts to scores[..., 0]. Entries of -inf are never taken. O(N log k), by the
    C++ kernel O(N).
    """
    N = scores.shape[-1]
    if cpp_scoring.why_not_top(scores) is None:
        each = count if isinstance(count, int) else count.expand(scores.shape[:-1]).reshape(1, -1)
        index = cpp_scoring.top(scores.reshape(1, -1, N), each)
        mask = torch.zeros(index.shape[1], N + 1, dtype=torch.bool)
        # What is absent goes to a column of its own.
        return mask.scatter_(1, torch.where(index < 0, N, index)[0], True)[:, :N].reshape(scores.shape)
    if isinstance(count, int):
        if count >= N:
            return scores > -torch.inf
        if count <= 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        # Unsorted: only the least of the best is needed.
        threshold = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        wanted: int | Tensor = count
    else:
        wanted = count.to(scores.device).expand(scores.shape[:-1])[..., None]
        ordered = scores.sort(dim=-1, descending=True).values
        threshold = ordered.gather(-1, (wanted - 1).clamp(0, N - 1))
        threshold = torch.where(wanted > 0, threshold, torch.inf)
    above = scores > threshold
    level = scores == threshold
    room = wanted - above.sum(-1, keepdim=True)
    mask = above | (level & (level.cumsum(-1) <= room))
    return mask & (scores > -torch.inf)


def slots_of(mask: Tensor) -> Tensor:
    """Ascending slots of the True entries of mask [B, H, N]: int64 [B, H, n], -1 beyond a row's own count."""
    counts = mask.sum(-1)
    most = int(counts.max())
    if bool((counts == most).all()):
        return mask.nonzero()[:, -1].view(*mask.shape[:-1], most)
    index = torch.full((*mask.shape[:-1], most), -1, dtype=torch.int64, device=mask.device)
    filled = torch.arange(most, device=mask.device) < counts[..., None]
    index[filled] = mask.nonzero()[:, -1]
    return index


def _has_topk_kernel(scores: Tensor) -> bool:
    if availability.why_not_device(scores) is not None or availability.why_not_dtypes(scores) is not None:
        return False
    return scores.numel() > 0


def _top_by_kernel(scores: Tensor, count: int) -> Tensor:
    """`top_slots` by the Triton kernel, which takes up to `count` of every row and puts -1 behind."""
    from foveate.attention.backends.triton import ops

    return ops.topk(scores.contiguous(), count, finite=True).long()


def top_slots(scores: Tensor, count: int | Tensor, *, tight: bool = False) -> Tensor:
    """The slots of the `count` highest scores [B, H, N] of each row, ascending; ties go to the lower slot.

    count: an int, or a tensor that broadcasts to scores[..., 0]. Entries of -inf are never taken.
    Returns int64 [B, H, n], -1 beyond a row's own count: `slots_of(top_mask(scores, count))`. On a GPU, for an int, n
    is the smaller of count and N, so that the last columns may be -1 in every row: how many scores are finite is known
    there only by waiting for it, which `tight` does.
    """
    if scores.dim() != 3:
        raise ShapeError(f"top_slots: scores {list(scores.shape)}, allowed: [B, H, N]")
    if _has_topk_kernel(scores) and isinstance(count, int):
        if count <= 0:
            return torch.empty(*scores.shape[:2], 0, dtype=torch.int64, device=scores.device)
        slots = _top_by_kernel(scores, min(count, scores.shape[-1]))
        return slots[..., : int((slots >= 0).sum(-1).max())] if tight else slots
    if cpp_scoring.why_not_top(scores) is not None:
        return slots_of(top_mask(scores, count))
    return cpp_scoring.top(scores, count)


@dataclass(frozen=True)
class RotaryTable:
    """Rotary embedding of `size` features at K positions: cosines and sines [K, P] float32 (float64 for float64).

    Pair p is the features a = p + span * (p // span) and a + span; features from 2 P on stay as they are.
    """

    cos: Tensor
    sin: Tensor
    size: int
    span: int

    @classmethod
    def of(cls, rotate: Callable[[Tensor, Tensor], Tensor], positions: Tensor, like: Tensor) -> RotaryTable | None:
        """Read off a rotary embedding by turning known vectors of the size of like [..., D] to positions [K].

        rotate: takes x [B, H, N, D] and positions [1, N]. Halves of any width and neighbours are found, with any
        scale of the frequencies; None for other layouts.
        """
        D, K = like.shape[-1], positions.shape[0]
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        unit = torch.eye(D, dtype=exact, device=like.device)
        # Whither position 1 turns the first feature, the fastest of all.
        span = int(rotate(unit[None, None, :1], torch.ones_like(positions[None, :1]))[0, 0, 0, 1:].abs().argmax()) + 1
        if 2 * span > D:
            return None
        pairs = D // 2 if span == 1 else span
        firsts = unit[: 2 * pairs].unflatten(0, (-1, 2, span))[:, 0].sum((0, 1))
        turned = rotate(firsts.expand(1, 1, K, -1), positions[None])[0, 0, :, : 2 * pairs]
        cos, sin = (each.flatten(1).contiguous() for each in turned.unflatten(-1, (-1, 2, span)).unbind(-2))
        made = cls(cos, sin, D, span)
        return made if made.agrees(rotate, positions) else None

    def agrees(self, rotate: Callable[[Tensor, Tensor], Tensor], positions: Tensor) -> bool:
        """Whether this table of positions [K] is that of a rotary embedding, by trying some of them."""
        some = slice(None, None, max(1, positions.shape[0] // 16))
        table = RotaryTable(self.cos[some], self.sin[some], self.size, self.span)
        trial = torch.linspace(-1, 2, self.size, dtype=self.cos.dtype, device=self.cos.device)
        trial = trial.expand(1, 1, table.cos.shape[0], -1)
        return torch.allclose(table.turn(trial), rotate(trial, positions[None, some]), rtol=1e-5, atol=1e-5)

    def undoing(self, other: RotaryTable) -> RotaryTable:
        """What turns by this table what `other`, of as many positions or of one, has turned already."""
        scale = other.cos * other.cos + other.sin * other.sin
        cos, sin = other.cos / scale, other.sin / scale
        return RotaryTable(
            torch.addcmul(self.cos * cos, self.sin, sin),
            torch.addcmul(self.sin * cos, self.cos, sin, value=-1),
            self.size,
            self.span,
        )

    def rows(self, start: int, stop: int) -> RotaryTable:
        """The positions start..stop - 1 of the table."""
        return RotaryTable(self.cos[start:stop], self.sin[start:stop], self.size, self.span)

    def moving(self, index: Tensor) -> RotaryTable:
        """A table [B, 1, K, P] by which entry j of lists index [B, K], of slot s, is turned as position s - j says."""
        moves = index - torch.arange(index.shape[1], device=index.device)
        return RotaryTable(self.cos[moves][:, None], self.sin[moves][:, None], self.size, self.span)

    def turn(self, x: Tensor) -> Tensor:
        """Rotate row j of x [..., K, D] to position j; computes in the table's dtype, returns x's."""
        width, pairs = 2 * self.cos.shape[-1], (-1, self.span)
        work = x.to(self.cos.dtype)
        a, b = work[..., :width].unflatten(-1, (-1, 2, self.span)).unbind(-2)
        cos, sin = self.cos.unflatten(-1, pairs), self.sin.unflatten(-1, pairs)
        turned = torch.stack((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -2).flatten(-3)
        return (torch.cat((turned, work[..., width:]), -1) if width < x.shape[-1] else turned).to(x.dtype)


def _check_table(what: str, table: RotaryTable | None, index: Tensor, tokens: int, compact: bool) -> None:
    """That a table has a position for every entry of a list, or for every move of a compact one."""
    held, wanted = (0 if table is None else table.cos.shape[0]), tokens if compact else index.shape[-1]
    if table is not None and (held < wanted if compact else held != wanted):
        allowed = f"{wanted} or more, one per slot" if compact else f"{wanted}, one per row"
        raise ShapeError(f"{what}: a table of {held} positions, allowed: {allowed}")


def take_rows(
    x: Tensor, index: Tensor, table: RotaryTable | None = None, out: Tensor | None = None, *, compact: bool = False
) -> Tensor:
    """Rows of x [B, H, N, D] by index int64 [B, K], the same for all heads: [B, H, K, D], row j turned as table says.

    index: slots 0..N-1, all present. table: K positions; None: rows as they are. out: where to write. compact: row j,
    of slot s, is turned as position s - j of the table says, by how far it moves to stand side by side with the others;
    index ascends. O(K H D).
    """
    sizes = match(x=(x, "B H N D"), index=(index, "B K"))
    shape = (sizes["B"], sizes["H"], sizes["K"], sizes["D"])
    _check_table("take_rows", table, index, sizes["N"], compact)
    if out is None:
        out = x.new_empty(shape)
    elif out.shape != shape or out.dtype != x.dtype:
        raise ShapeError(f"take_rows: out {list(out.shape)} {out.dtype}, allowed: {list(shape)} {x.dtype}")
    if cpp_scoring.why_not_take(x, out) is None:
        cos, sin, span = (None, None, 1) if table is None else (table.cos, table.sin, table.span)
        cpp_scoring.take(x, index, cos, sin, span, out, compact)
        return out
    if table is not None and compact:
        table = table.moving(index)
    rows = gather_rows(x, index[:, None].expand(-1, sizes["H"], -1))
    return out.copy_(rows if table is None else table.turn(rows))


def reads_in_place(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_rows` reads the rows where they lie, and copies none."""
    wanted = os.environ.get("FOVEATE_BACKEND", "auto") in ("auto", "cpp")
    return wanted and cpp_scoring.why_not_rows(q, k, v) is None


@dataclass(frozen=True)
class Rows:
    """Keys that every one of M queries reads: q [B, Hq, M, D] over the rows index int64 [B, K], all present, of
    k [B, Hkv, N, D] and v [B, Hkv, N, Dv], the same for all heads, key j of them turned as table (K positions) says.

    index None: all rows, without a table. table None: keys as they are. compact: as in `take_rows`. Raises ShapeError.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor | None = None
    table: RotaryTable | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        sizes = match(q=(self.q, "B Hq M D"), k=(self.k, "B Hkv N D"), v=(self.v, "B Hkv N Dv"))
        if self.index is not None:
            match(k=(self.k, "B Hkv N D"), index=(self.index, "B K"))
            _check_table("attend_rows", self.table, self.index, sizes["N"], self.compact)
        elif self.table is not None:
            raise ShapeError(f"attend_rows: a table of {self.table.cos.shape[0]} positions, allowed: one with an index")

    @property
    def in_place(self) -> bool:
        return reads_in_place(self.q, self.k, self.v)


def attend_rows(*parts: Rows, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over the rows of all parts, whose queries are the same at different positions; no causal mask.

    Returns o [B, Hq, M, Dv] in q's dtype, lse [B, Hq, M] float32 (float64 for float64). O(K Hq M D).
    """
    # The C++ kernel turns every list by one table, and has one distance between rows.
    tables = {(id(part.table), part.compact): part for part in parts if part.index is not None}
    strides = {(part.k.stride(2), part.v.stride(2)) for part in parts}
    if softcap is None and max(len(tables), len(strides)) == 1 and all(part.in_place for part in parts):
        listed = next(iter(tables.values()), None)
        table = None if listed is None else listed.table
        turns = None
        if listed is not None and table is not None:
            turns = (table.cos.contiguous(), table.sin.contiguous(), table.span, listed.compact)
        return cpp_scoring.attend_rows([(part.q, part.k, part.v, part.index) for part in parts], turns, scale)
    if len(parts) > 1:
        found = [attend_rows(part, scale=scale, softcap=softcap) for part in parts]
        return merge([o for o, _ in found], [lse for _, lse in found])
    (part,) = parts
    q, k, v = part.q, part.k, part.v
    if part.index is not None:
        k, v = take_rows(k, part.index, part.table, compact=part.compact), take_rows(v, part.index)
    # By default more queries than keys would stand nowhere.
    positions = Positions(torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device))
    o, lse = attend(q, k, v, scale=scale, positions=positions, causal=False, softcap=softcap, return_lse=True)
    return o, lse
