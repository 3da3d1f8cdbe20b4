"""KIVI: keys coded per channel, values per token, in 2 or 4 bits; the last tokens stay as they are.  (arXiv 2402.02750)

Keys have a few channels that are large in every token, so each channel gets a scale of its own over `group` consecutive
tokens; values have none, and each token gets scales over `group` channels. What is recent matters most and stays in
full precision. Prompts attend exactly, then all but the residual is coded and the full-precision copy is dropped.

    code      round((x - least) / scale), least = min, scale = (max - least) / (2^bits - 1)
    decoded   code * scale + least            as `attention.quantize` codes; scale and least in the model's dtype
    keys      at any time the first N - N mod R tokens are coded: after the step that fills a residual of R, all of it
    values    the first max(0, N - R) tokens are coded, one after every step
    step      softmax of [q . decoded keys, q . residual keys] times [decoded values, residual values]; R = `residual`

32 / bits codes lie in an int32, the lowest bits first: of consecutive tokens for keys (along N), of consecutive
channels for values. The cache itself holds the last R tokens; where their keys are coded already, it holds the decoded
ones. The coded part is decoded in pieces of `piece` tokens, attended to, and merged with the rest by log-sum-exps.

Bytes per key and value number: bits / 8 and 2 scale numbers per group; at 2 bits, groups of 32 and float16 5.3 times
less than float16, plus the residual. A step costs O(N D) and decodes everything once.
Differs from the authors' code: quotients are float32 (theirs: the model's dtype), so codes are the nearest to the
stored scales; a group of equal numbers has scale 0 and decodes exactly (theirs: NaN); GQA reads a KV head once; later
pieces of text attend to what is coded by then, exactly to themselves; int32 words for 4 bits too.
Alone: what is coded cannot be evicted or selected from. OptionError where residual, group and bits do not fit each
other or the model's head width, which must be a multiple of group and of 32 / bits (ShapeError where values are not as
wide as the model says).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Positions, apply_sink, attend, merge
from foveate.attention.quantize import Coded, dequantize, quantize
from foveate.attention.scoring import slots_of
from foveate.errors import OptionError, ShapeError
from foveate.methods.base import Method
from foveate.methods.cache import Change, Keep
from foveate.methods.step import Phase, Reading, Step
from foveate.methods.storage import slack
from foveate.options import option
from foveate.registry import register


@dataclass
class Codes:
    """The coded part of one layer; token j of a row lies at index j.

    keys: code [B, Hkv, n bits / 32, D], scale and least [B, Hkv, n / group, D].
    values: code [B, Hkv, n, D bits / 32], scale and least [B, Hkv, n, D / group].
    key_count, value_count: int64 [B] on the host, tokens coded per row; beyond, the buffers hold nothing.
    """

    keys: Coded
    values: Coded
    key_count: Tensor
    value_count: Tensor


@register(
    "kivi",
    kind="quantize",
    paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arxiv="2402.02750",
    year=2024,
    applies_to="pretrained",
    exact={"group": 16, "residual": 16 * 10**5},
    small={"bits": 2, "group": 16, "residual": 16},
    claim=(
        "Bundled model, 2k tokens, 2 windows of 64 steps: KL divergence from dense 0.004 with 4 bits, 0.117 "
        "with 2 bits, 0.080 with 2 bits in groups of 16; perplexity 11.98, 14.01 and 12.56 (dense 11.99). A "
        "passkey is found in 2 of 2 texts with 4 bits, in 1 of 2 with 2 bits "
        "(benchmarks/results/claims/kivi.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Kivi(Method):
    """Codes old keys per channel and old values per token in 2 or 4 bits; the last tokens stay in full precision."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"extend", "decode"})
    evicts: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    bits: int = option(2, "bits per key number", one_of=(1, 2, 4, 8))
    value_bits: int | None = option(None, "bits per value number; none: like keys", one_of=(None, 1, 2, 4, 8))
    group: int = option(32, "numbers that share a scale", at_least=1)
    residual: int = option(128, "last tokens in full precision, a multiple of group", at_least=1)
    piece: int = option(4096, "coded tokens decoded at once", at_least=1)

    def check(self) -> None:
        if self.residual % self.group:
            raise self.refuse("residual", f"a multiple of group={self.group}")
        if self.residual % (32 // self.bits):
            raise self.refuse("residual", f"a multiple of 32 / bits = {32 // self.bits}, the keys of one word")

    def for_model(self, identity: Any) -> Method:
        """Itself; OptionError where the model's heads are too narrow for the groups or words of values."""
        width, per_word = identity.head_dim, 32 // self.own_value_bits
        if width % self.group:
            raise self.refuse("group", f"what divides the model's head width, {width}, e.g. {gcd(self.group, width)}")
        if width % per_word:
            raise OptionError(
                f"{type(self).__name__}: {self.own_value_bits} bits per value number put {per_word} of them in a word, "
                f"which does not divide the model's head width, {width}; allowed: more bits (value_bits)"
            )
        return self

    @property
    def own_value_bits(self) -> int:
        return self.bits if self.value_bits is None else self.value_bits

    # --- reading

    def attend(self, step: Step) -> Tensor:
        codes = step.state
        if step.phase == "prefill" or codes is None or not int(codes.value_count.max()):
            return step.attend()
        # Read in whole: fewer bytes, not fewer keys.
        if step.run.record:
            visible = step.m * (step.cache.seen - step.m) + step.m * (step.m + 1) / 2
            step.run.readings.append(Reading(step.layer, step.phase, visible, visible))
        parts = [self._read(step, step.k, step.v, step.positions)]
        at = step.query_positions()
        count = codes.value_count
        for start in range(0, int(count.max()), self.stride):
            stop = min(start + self.stride, int(count.max()))
            keys, values = self.decoded(codes, start, stop)
            order = torch.arange(start, stop, device=at.device).expand(at.shape[0], 1, -1)
            held = torch.where(order < count.to(at.device)[:, None, None], order, -1)
            parts.append(self._read(step, keys, values, Positions(at, held, True)))
        o, lse = merge([o for o, _ in parts], [lse for _, lse in parts])
        return o if step.sink is None else apply_sink(o, lse, step.sink)[0]

    @property
    def stride(self) -> int:
        """Tokens decoded at once: whole residuals, so that groups and words of keys are whole too."""
        return max(1, self.piece // self.residual) * self.residual

    def decoded(self, codes: Codes, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, stop - start, D] of coded tokens; start must be a multiple of `residual`."""
        end = start + -(-(stop - start) // self.residual) * self.residual
        per_word = 32 // self.bits
        keys = Coded(
            codes.keys.code[:, :, start // per_word : end // per_word],
            codes.keys.scale[:, :, start // self.group : end // self.group],
            codes.keys.least[:, :, start // self.group : end // self.group],
        )
        parts = codes.values.code, codes.values.scale, codes.values.least
        values = Coded(*(each[:, :, start:stop] for each in parts))
        made = dequantize(keys, self.bits, self.group, dim=2)[:, :, : stop - start]
        return made, dequantize(values, self.own_value_bits, self.group, dim=3)

    @staticmethod
    def _read(step: Step, k: Tensor, v: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        o, lse = attend(
            step.q,
            k,
            v,
            scale=step.scale,
            positions=positions,
            window=step.window,
            softcap=step.softcap,
            return_lse=True,
        )
        return o, lse

    # --- coding

    def keep(self, step: Step) -> Change | None:
        self._check_width(step.k, step.v)
        if step.cache.holes:
            real = step.positions.keys(step.cache.stored, step.q.device)[:, 0] >= 0
            for row in range(step.q.shape[0]):
                slots = real[row].nonzero()[:, 0]
                self._code_rows(step, slice(row, row + 1), slots.numel(), slots)
        else:
            self._code_rows(step, slice(None), step.cache.stored)
        return self._last(step)

    def _check_width(self, k: Tensor, v: Tensor) -> None:
        per_word = 32 // self.own_value_bits
        if v.shape[-1] % self.group or v.shape[-1] % per_word:
            raise ShapeError(
                f"values of width {v.shape[-1]} cannot be coded in groups of {self.group} and words of {per_word}; "
                "choose a group that divides the width"
            )

    def _code_rows(self, step: Step, rows: slice, held: int, slots: Tensor | None = None) -> None:
        """Code what has left the residual of rows that hold `held` tokens, oldest first, in these slots or all."""
        if step.state is None:
            step.state = self._empty(step)
        codes, R = step.state, self.residual
        # Held tokens begin where values stop being coded.
        begin = int(codes.value_count[rows][0])
        n = begin + held
        for store, counts, upto in (
            (codes.keys, codes.key_count, n - n % R),
            (codes.values, codes.value_count, max(0, n - R)),
        ):
            first = int(counts[rows][0])
            if upto <= first:
                continue
            part = slice(first - begin, upto - begin)
            span = part if slots is None else slots[part]
            if store is codes.keys:
                made = quantize(step.k[rows][:, :, span], self.bits, self.group, dim=2)
                _put(store, made, rows, first // (32 // self.bits), first // self.group)
                # The cache has the keys of its last tokens as a step reads them: decoded.
                step.k[rows, :, span] = dequantize(made, self.bits, self.group, dim=2)
            else:
                made = quantize(step.v[rows][:, :, span], self.own_value_bits, self.group, dim=3)
                _put(store, made, rows, first, first)
            counts[rows] = upto

    def _last(self, step: Step) -> Change | None:
        """Hold the last `residual` tokens of every row."""
        stored, R = step.cache.stored, self.residual
        if stored <= R:
            return None
        if not step.cache.holes:
            return Keep(torch.arange(stored - R, stored, device=step.q.device).expand(*step.cache.shape, -1))
        real = step.positions.keys(stored, step.q.device)[:, :1] >= 0
        later = real.flip(-1).cumsum(-1).flip(-1)
        return Keep(slots_of(real & (later <= R)).expand(*step.cache.shape, -1))

    def _empty(self, step: Step) -> Codes:
        B, H = step.cache.shape
        k, v, none = step.k, step.v, torch.zeros(B, dtype=torch.int64)
        keys = Coded(
            k.new_zeros(B, H, 0, k.shape[-1], dtype=torch.int32), *(k.new_zeros(B, H, 0, k.shape[-1]) for _ in range(2))
        )
        values = Coded(
            v.new_zeros(B, H, 0, v.shape[-1] * self.own_value_bits // 32, dtype=torch.int32),
            *(v.new_zeros(B, H, 0, v.shape[-1] // self.group) for _ in range(2)),
        )
        return Codes(keys, values, none, none.clone())


def _put(store: Coded, made: Coded, rows: slice, word: int, scale: int) -> None:
    """Write new codes at index `word` and their scales at index `scale` of the rows, growing the buffers."""
    for name, at in (("code", word), ("scale", scale), ("least", scale)):
        new, buffer = getattr(made, name), getattr(store, name)
        end = at + new.shape[2]
        if end > buffer.shape[2]:
            buffer = F.pad(buffer, (0, 0, 0, end + slack(end, least=2) - buffer.shape[2]))
            setattr(store, name, buffer)
        buffer[rows, :, at:end] = new
