"""L2ViT's claim in small: global linear attention is too flat by itself; a local concentration after it, and layers of
local windows between, make up for it.

    python benchmarks/claims/l2vit.py [--device cuda] [--steps 1500] [--seeds 2] [--data fashion-mnist]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from images import accuracies, arguments, record, with_mixer
from torch import Tensor, nn

from foveate.mixers.linear.l2vit import GlobalBlock, WindowBlock

DIM, HEADS = 64, 4

CLAIM = "a local concentration after global linear attention, and windows between, raise its accuracy"


class Nothing(nn.Module):
    """Stands in for the concentration and adds zeros."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.new_zeros(())


def global_blocks(floor: float, *, concentrated: bool, windows: bool) -> Callable[[int], nn.Module]:
    """Global blocks, in every layer or in every second one behind a window block."""

    def block(layer: int) -> nn.Module:
        if windows and layer % 2 == 0:
            return WindowBlock(DIM, HEADS, window=4)
        made = GlobalBlock(DIM, HEADS, floor=floor)
        if not concentrated:
            made.concentration = Nothing()  # type: ignore[assignment]
        return made

    return block


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    save = partial(record, "l2vit", CLAIM, given, started)
    blocks = {
        "softmax": with_mixer("softmax:rotary=false,causal=false", DIM, HEADS),
        "global": global_blocks(1.0, concentrated=False, windows=False),
        "global + concentration": global_blocks(1.0, concentrated=True, windows=False),
        "global + concentration, floor 100": global_blocks(100.0, concentrated=True, windows=False),
        "windows, global + concentration": global_blocks(1.0, concentrated=True, windows=True),
    }
    rows, _ = accuracies(blocks, given, lambda rows: save(rows=rows))
    save(rows=rows)


if __name__ == "__main__":
    main()
