"""One call of `linear_scan` or `linear_step`, as backends see it, and the checks that precede it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.chunks import check_chunk_size, read_offsets
from foveate.attention.features import l2norm
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError, StateError


@dataclass(frozen=True)
class LinearCall:
    """Arguments of `linear_scan` after validation. Shapes as there; `offsets` are cu_seqlens as integers."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float
    normalize: bool
    eps: float
    qk_l2norm: bool
    initial_state: Tensor | None
    output_final_state: bool
    cu_seqlens: Tensor | None
    offsets: tuple[int, ...] | None
    chunk_size: int

    @property
    def sequences(self) -> int:
        """N: rows of the state."""
        return self.q.shape[0] if self.offsets is None else len(self.offsets) - 1

    @property
    def dtype(self) -> torch.dtype:
        """What the recurrence is computed in, and the dtype of the state."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        V = self.v.shape[-1] + self.normalize
        return self.sequences, self.v.shape[2], self.q.shape[-1], V

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, HV, K] and v [B, T, HV, V] in the computing dtype, one q/k head per value head.

        With `normalize`, v has a last column of ones, which gathers the sum of k. `scale` is left to the backend.
        """
        q, k, v = (each.to(self.dtype) for each in (self.q, self.k, self.v))
        if self.qk_l2norm:
            q, k = l2norm(q), l2norm(k)
        group = v.shape[2] // q.shape[2]
        if group > 1:
            q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
        if self.normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return q, k, v

    def decay(self) -> Tensor | None:
        """g with its token axis: None, [B, T, HV] or [B, T, HV, K]."""
        if self.g is None or self.g.dim() > 1:
            return self.g
        return self.g.expand(*self.q.shape[:2], -1)

    def start(self) -> Tensor:
        """The state before the first token [N, HV, K, V]."""
        if self.initial_state is None:
            return self.q.new_zeros(self.state_shape, dtype=self.dtype)
        return self.initial_state.to(self.dtype)

    def output(self, o: Tensor) -> Tensor:
        """o [B, T, HV, V] in q's dtype, divided by the normaliser when the call has one."""
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + self.eps)
        return o.to(self.q.dtype)


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    normalize: bool,
    eps: float,
    qk_l2norm: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> LinearCall:
    """Check the arguments of `linear_scan`; the docstring there names the errors."""
    sizes = match(q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ShapeError(f"q, k and v must have one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if sizes["T"] == 0:
        raise ShapeError(f"q {list(q.shape)} has T = 0, allowed: at least one token")
    if sizes["H"] == 0 or sizes["HV"] % sizes["H"] or sizes["HV"] == 0:
        raise ShapeError(f"v has {sizes['HV']} heads and q has {sizes['H']}: HV must be a multiple of H")
    check_chunk_size(chunk_size)
    if normalize and beta is not None:
        raise OptionError("normalize=True with beta: a delta rule has no sum of keys to divide by; drop one of them")
    if beta is not None:
        match(v=(v, "B T HV V"), beta=(beta, "B T HV"))
    if g is not None:
        _check_decay(g, sizes)
    call = LinearCall(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=sizes["K"] ** -0.5 if scale is None else scale,
        normalize=normalize,
        eps=eps,
        qk_l2norm=qk_l2norm,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        offsets=None if cu_seqlens is None else read_offsets(cu_seqlens, sizes["B"], sizes["T"]),
        chunk_size=chunk_size,
    )
    if initial_state is not None:
        check_state(initial_state, call.state_shape, "N, HV, K, V + 1" if normalize else "N, HV, K, V")
    return call


def check_state(state: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Raise StateError for a state of another shape or of integers."""
    if tuple(state.shape) != tuple(shape) or not state.is_floating_point():
        raise StateError(
            f"the state is {list(state.shape)} {state.dtype}, allowed: [{letters}] = {list(shape)} of floats; "
            "it belongs to another layer, batch or option"
        )


def _check_decay(g: Tensor, sizes: dict[str, int]) -> None:
    allowed = {1: ("HV",), 3: ("B", "T", "HV"), 4: ("B", "T", "HV", "K")}
    letters = allowed.get(g.dim())
    if letters is None or tuple(g.shape) != tuple(sizes[letter] for letter in letters):
        raise ShapeError(
            f"g {list(g.shape)} does not fit [HV], [B, T, HV] or [B, T, HV, K] with "
            + ", ".join(f"{letter} = {sizes[letter]}" for letter in ("B", "T", "HV", "K"))
        )
    check_log_decay(g, "g")


def check_log_decay(g: Tensor, name: str) -> None:
    """Raise OptionError where g > 0; of tensors on the CPU only.

    On a GPU every call would have to wait for all that was launched before it. FOVEATE_CHECK_VALUES=1 asks for that.
    """
    if torch.compiler.is_compiling() or g.numel() == 0 or g.is_meta:
        return
    if g.device.type != "cpu" and os.environ.get("FOVEATE_CHECK_VALUES") != "1":
        return
    largest = g.detach().amax().item()
    if largest > 0:
        raise OptionError(
            f"{name} has the value {largest:.6g}, allowed: <= 0 (the natural log of a decay); pass log(decay)"
        )
