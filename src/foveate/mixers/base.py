"""The mixer protocol: trainable layers x [B, N, C] -> y [B, N, C] that mix tokens, and the state they decode with.

One forward serves training (state=None), chunked prefill and decoding (state given): whatever way the tokens of a
sequence are split over calls, the outputs agree. What all mixers share is here, once: checks, positions, padding and
packed sequences. A mixer writes `start` (its state before the first token) and `mix` (the layer itself).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from foveate import registry
from foveate.attention.chunks import read_offsets
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError, StateError, UnknownNameError
from foveate.mixers.state import MixerState, SeparateStates, merge_states, single_rows
from foveate.options import Bounds, check_names, nearest, options_of, parse_spec

PATTERNS = frozenset({"causal-self", "noncausal-self", "causal-cross", "noncausal-cross"})


class Initialised(nn.Module):
    """A module whose own parameters and buffers have starting values of their own (Linear layers have torch's)."""

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values by name, for parameters and buffers of this module that are not in a child."""
        return {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, value in self.initial_values().items():
            getattr(self, name).copy_(value)


class Mixer(Initialised):
    """A trainable token mixer.

    Options are the constructor's keyword-only arguments, and start with:
        dim: channels C.
        layer: index of the layer in its model, from 0.    layers: how many the model has.
        heads: heads.

    Class attributes:
        patterns: what it can be used for, out of PATTERNS. Non-causal use needs an option `causal=False`, or a mixer
            that is never causal (`causal = False` on the class).
        lacking: why it cannot be used for a pattern, by pattern.
        constant_state: whether the state stops growing with the length (an option may change it for an instance).
        packs: whether `mix` takes packed sequences; otherwise they are run one by one (an option may change it too).
        length: the only number of tokens it takes (a grid); None for any.
        shared: names of parameters that all layers of this mixer in one model share.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"causal-self"})
    lacking: ClassVar[Mapping[str, str]] = {}
    constant_state: bool = True
    packs: bool = True
    length: int | None = None
    shared: ClassVar[tuple[str, ...]] = ()
    causal: bool = True

    def __init__(
        self,
        *,
        dim: Annotated[int, Bounds(at_least=1)],
        layer: Annotated[int, Bounds(at_least=0)] = 0,
        layers: Annotated[int, Bounds(at_least=1)] = 1,
        heads: Annotated[int, Bounds(at_least=1)] = 4,
    ) -> None:
        super().__init__()
        given = {"dim": dim, "layer": layer, "layers": layers, "heads": heads}
        for option in COMMON:
            option.check(self.name, given[option.name])
        self.require(0 <= layer < layers, f"layer={layer}, allowed: 0 to layers - 1 = {layers - 1}")
        self.dim, self.layer, self.layers, self.heads = dim, layer, layers, heads

    @property
    def name(self) -> str:
        return getattr(type(self), "registered_name", type(self).__name__)

    @property
    def owner(self) -> str:
        """Names this layer in its states, for `MixerState.check`."""
        return f"{self.name}(dim={self.dim}, heads={self.heads}, layer={self.layer})"

    @classmethod
    def require(cls, fits: bool, message: str) -> None:
        """Raise OptionError with the mixer's name and `message` unless `fits`."""
        if not fits:
            raise OptionError(f"{getattr(cls, 'registered_name', cls.__name__)}: {message}")

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Tensor | None = None,
        context_padding: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix the tokens of each sequence.

        Args:
            x: [B, N, C], the next N tokens of B sequences.
            state: what the last call returned, a row per sequence; None before the first token.
            positions: [B or 1, N] int64, where the tokens stand (matters to rotary angles); default: they continue
                from the state. What a token reads depends on the order of tokens alone.
            padding: [B, N] bool, True for real tokens. The others are read by nobody, may hold anything, and their
                y is 0; they may stand anywhere, also between calls.
            cu_seqlens: [R + 1], boundaries of R sequences packed into B = 1; a state has R rows. Empty ones keep
                their state. Best on the CPU: it is read there.
            context: [B, M, C], cross attention: x reads the context instead of itself, and no state is kept.
            context_padding: [B, M] bool, True for real tokens of the context.
        Returns:
            y [B, N, C]; the state after the last token, a `MixerState` (None for cross or non-causal use).
        Raises:
            ShapeError, StateError (another mixer's state, another batch size), OptionError (a pattern it lacks).
        """
        match(x=(x, f"B N {self.dim}"))
        B, N, _ = x.shape
        if N == 0:
            raise ShapeError(f"{self.owner}: x {list(x.shape)} has N = 0, allowed: at least one token")
        self._check_pattern(context)
        if context is not None:
            given = {"state": state, "positions": positions, "cu_seqlens": cu_seqlens}
            self.require(
                all(each is None for each in given.values()),
                f"context with {[name for name, each in given.items() if each is not None]}, allowed: padding only",
            )
            return self._cross(x, context, padding, context_padding), None
        offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, N)
        rows = B if offsets is None else len(offsets) - 1
        self._check_length([N] if offsets is None else [b - a for a, b in pairwise(offsets)])
        if state is not None:
            if not self.causal:
                raise StateError(f"{self.owner} is not causal and keeps no state, allowed: state=None")
            state.check(self.owner, rows)
        if positions is not None:
            match(x=(x, "B N C"), positions=(positions.expand(B, -1), "B N"))
        if padding is not None:
            self.require(cu_seqlens is None, "padding with cu_seqlens, allowed: one of them")
            match(x=(x, "B N C"), padding=(padding, "B N"))
            if not bool(padding.all()):
                return self._padded(x, state, positions, padding)
        return self._run(x, state, positions, cu_seqlens, offsets)

    def _run(
        self,
        x: Tensor,
        state: Any,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        offsets: tuple[int, ...] | None,
    ) -> tuple[Tensor, Any]:
        rows = x.shape[0] if offsets is None else len(offsets) - 1
        state = self.start(rows, x) if state is None else state
        following = positions
        if positions is None:
            positions = _continued(state.position, x, offsets)
        if isinstance(state, SeparateStates) or (offsets is not None and not self.packs):
            y, after = self._one_by_one(x, state, positions.expand(x.shape[0], -1), offsets)
        else:
            y, after = self.mix(x, state, positions.expand(x.shape[0], -1), cu_seqlens)
        if not self.causal:
            return y, None
        return y, _at(after, _next(state.position, following, x, offsets))

    def _one_by_one(
        self, x: Tensor, state: MixerState, positions: Tensor, offsets: tuple[int, ...] | None
    ) -> tuple[Tensor, MixerState]:
        """Each sequence alone, packed or a row of the batch."""
        outputs, states = [], single_rows(state)
        for n, row in enumerate(states):
            piece = (slice(n, n + 1), slice(None)) if offsets is None else (slice(None), slice(*offsets[n : n + 2]))
            if x[piece].shape[1]:
                y, states[n] = self.mix(x[piece], row, positions[piece], None)
                outputs.append(y)
        return torch.cat(outputs, 0 if offsets is None else 1), merge_states(states)

    def _padded(self, x: Tensor, state: Any, positions: Tensor | None, padding: Tensor) -> tuple[Tensor, Any]:
        """Pack the real tokens, run, and put the outputs back."""
        y = x.new_zeros(x.shape)
        lengths = padding.sum(1)
        if not bool(lengths.any()):
            return y, (state or self.start(x.shape[0], x)) if self.causal else None
        cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).cpu()
        if positions is not None:
            positions = positions.expand(x.shape[0], -1)[padding][None]
        packed, state = self.forward(x[padding][None], state=state, positions=positions, cu_seqlens=cu_seqlens)
        y = y.to(packed.dtype)
        y[padding] = packed[0]
        return y, state

    def _cross(self, x: Tensor, context: Tensor, padding: Tensor | None, context_padding: Tensor | None) -> Tensor:
        match(x=(x, f"B N {self.dim}"), context=(context, f"B M {self.dim}"))
        if context_padding is not None:
            match(context=(context, "B M C"), context_padding=(context_padding, "B M"))
        y = self.cross(x, context, context_padding)
        if padding is None:
            return y
        match(x=(x, "B N C"), padding=(padding, "B N"))
        return y.masked_fill(~padding[..., None], 0)

    def _check_pattern(self, context: Tensor | None) -> None:
        pattern = ("causal" if self.causal else "noncausal") + ("-self" if context is None else "-cross")
        why = f" ({self.lacking[pattern]})" if pattern in self.lacking else ""
        self.require(pattern in self.patterns, f"used as {pattern}, allowed: {sorted(self.patterns)}{why}")

    def _check_length(self, lengths: list[int]) -> None:
        if self.length is not None and any(each != self.length for each in lengths):
            raise ShapeError(f"{self.owner}: sequences of {lengths} tokens, allowed: {self.length} each")

    def start(self, batch: int, like: Tensor) -> Any:
        """The state of `batch` sequences before their first token, for inputs like `like` (device and dtype)."""
        return MixerState(owner=self.owner, position=start_position(batch, like))

    @abstractmethod
    def mix(self, x: Tensor, state: Any, positions: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The layer, after all checks: x [B, N, C], a state of its own, positions [B, N], no padding.

        Returns y and the state after the last token; the caller advances `state.position`. A mixer with packs=False
        never gets cu_seqlens.
        """

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        """x [B, N, C] reads the context [B, M, C]; a mixer with a cross pattern writes this."""
        raise NotImplementedError(f"{type(self).__name__} declares a cross pattern and lacks `cross`")

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state that `batch` sequences have after `length` tokens each, in the parameters' dtype."""
        return self.start(batch, self.meta()).bytes() if self.causal else 0

    def meta(self) -> Tensor:
        """An empty tensor on the meta device, of the parameters' dtype."""
        return torch.empty(0, dtype=next(self.parameters()).dtype, device="meta")


# Options of every mixer, which this constructor checks.
COMMON = options_of(Mixer)


def _at(state: MixerState, position: Tensor) -> MixerState:
    """The state with these positions of the next tokens."""
    if isinstance(state, SeparateStates):
        rows = tuple(dataclasses.replace(row, position=at) for row, at in zip(state.rows, position.split(1)))
        return dataclasses.replace(state, position=position, rows=rows)
    return dataclasses.replace(state, position=position)


def start_position(batch: int, like: Tensor) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64, device=like.device)


def exact(like: Tensor) -> torch.dtype:
    """What recurrences are computed and kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _continued(position: Tensor, x: Tensor, offsets: tuple[int, ...] | None) -> Tensor:
    """[B, N] positions that continue from each row's last token."""
    steps = torch.arange(x.shape[1], device=x.device)
    if offsets is None:
        return position[:, None] + steps
    bounds = torch.tensor(offsets, device=x.device)
    first = position - bounds[:-1]
    return (steps + first.repeat_interleave(bounds.diff(), output_size=x.shape[1]))[None]


def _next(before: Tensor, given: Tensor | None, x: Tensor, offsets: tuple[int, ...] | None) -> Tensor:
    """[R] the position of each sequence's next token."""
    if offsets is None:
        return before + x.shape[1] if given is None else given[:, -1].expand(x.shape[0]) + 1
    bounds = torch.tensor(offsets, device=x.device)
    lengths = bounds.diff()
    if given is None:
        return before + lengths
    last = given.expand(1, -1)[0, (bounds[1:] - 1).clamp(min=0)] + 1
    return torch.where(lengths > 0, last, before)


def create_mixer(spec: str, *, dim: int, **options: Any) -> Mixer:
    """Make a mixer by name, or by a spec such as `"softmax:window=256"`.

    Raises UnknownNameError for an unknown mixer or option, naming the nearest; OptionError for a bad value.
    """
    target, options = resolve_mixer(spec, dim=dim, **options)
    made = target(**options)
    assert isinstance(made, Mixer)
    return made


def resolve_mixer(spec: str, **options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that a spec names and all its options, checked by name and type; nothing is made."""
    name, parsed = parse_spec(spec)
    known = registry.names(kind="mixer")
    if name not in known:
        raise UnknownNameError(f"there is no mixer {name!r}{nearest(name, known)}")
    card = registry.card(name)
    given = {**options, **parsed}
    check_names(name, given, card.options)
    for option in card.options:
        if option.name in given:
            given[option.name] = option.check(name, given[option.name])
    return card.target, given
