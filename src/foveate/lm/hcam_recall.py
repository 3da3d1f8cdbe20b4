"""The ballet: sequences seen once, a distraction, and one of them to be repeated from its cue (after HCAM's task).

    cue_1 s s ... s   cue_2 s s ... s   ...   distraction   cue_i s s ... s
    `dances` times a cue and `steps` symbols | `delay` symbols | `asked` of the dances again, labels: the next symbol

Paper: Lampinen et al. 2021 (arXiv 2105.14039), whose agent sees dancers and is asked for one dance; here everything is
tokens and learning is supervised. A dance with its cue is steps + 1 tokens, so that chunks of that size (and a delay of
a multiple of it) hold a dance each. Tokens: cues 0 .. cues - 1, then symbols. Symbols are drawn uniformly, so nothing
but memory can do better than 1 / symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.errors import OptionError
from foveate.lm.synthetic import IGNORED, Examples


def ballet_vocabulary(cues: int = 64, symbols: int = 16) -> int:
    """How many tokens there are."""
    return cues + symbols


def ballet_length(dances: int = 8, steps: int = 15, delay: int = 64, asked: int = 1) -> int:
    """Tokens of an example."""
    return (dances + asked) * (steps + 1) + delay


def ballet(
    count: int,
    *,
    dances: int = 8,
    steps: int = 15,
    delay: int = 64,
    asked: int = 1,
    cues: int = 64,
    symbols: int = 16,
    seed: int = 0,
) -> Examples:
    """`count` examples, labels at the asked dances: at the cue and at every step but the last, the next symbol.

    Raises OptionError for numbers below 1 (delay: 0), more dances than cues, or more asked than there are dances.
    """
    sizes = {"count": count, "dances": dances, "steps": steps, "asked": asked, "cues": cues, "symbols": symbols}
    for name, value in sizes.items():
        _require(value >= 1, f"{name}={value}, allowed: >= 1")
    _require(delay >= 0, f"delay={delay}, allowed: >= 0")
    _require(dances <= cues, f"dances={dances}, allowed: at most cues = {cues}")
    _require(asked <= dances, f"asked={asked}, allowed: at most dances = {dances}")
    random = torch.Generator().manual_seed(seed)
    dancers = torch.rand(count, cues, generator=random).argsort(1)[:, :dances, None]
    moves = torch.randint(symbols, (count, dances, steps), generator=random) + cues
    noise = torch.randint(symbols, (count, delay), generator=random) + cues
    shown = torch.cat((dancers, moves), 2)
    chosen = torch.rand(count, dances, generator=random).argsort(1)[:, :asked]
    again = shown.gather(1, chosen[..., None].expand(-1, -1, steps + 1))
    answers = torch.nn.functional.pad(again[..., 1:], (0, 1), value=IGNORED)
    before = torch.cat((shown.flatten(1), noise), 1)
    return Examples(
        torch.cat((before, again.flatten(1)), 1),
        torch.cat((torch.full_like(before, IGNORED), answers.flatten(1)), 1),
    )


def whole_dances(predictions: Tensor, labels: Tensor, steps: int) -> Tensor:
    """[n] share of the asked dances that predictions [n, L] repeat without a fault."""
    right = (predictions == labels)[labels != IGNORED].view(labels.shape[0], -1, steps)
    return right.all(2).float().mean(1)


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise OptionError(f"ballet: {message}")
