"""Moneta, Yaad and Memora: the three memories that the Miras paper names; the layer and its rules are in `miras`.

Paper: Behrouz et al. 2025 (arXiv 2504.13173).
"""

from __future__ import annotations

from foveate.mixers.memory.miras import PAPER, SMALL, MirasBase
from foveate.mixers.memory.miras_choices import THRESHOLDED
from foveate.registry import register


@register(
    "moneta",
    kind="mixer",
    paper=PAPER,
    arxiv="2504.13173",
    year=2025,
    applies_to="from scratch",
    small=SMALL,
    claim=(
        "Not reproduced: with 0, 20 and 40 % of the shown values wrong, recall 0.993, 0.864 and 0.662 with p = 3 and "
        "1.000, 0.898 and 0.674 with p = 1.5; the squared error has 0.998, 0.890 and 0.681 "
        "(benchmarks/results/claims/miras.json). Multi-query recall, 64 pairs: 0.788, linear attention 0.658 "
        "(benchmarks/results/mqar.json)."
    ),
)
class MonetaMixer(MirasBase):
    """A test-time memory with an Lp loss and weights normalised by their Lq norm.

    p: of the loss.    q: of the norm; 2 for none.    head_dim, expansion, kernel, chunk, rank: as in miras.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        expansion: float = 4.0,
        kernel: int = 4,
        chunk: int = 64,
        rank: int | None = 32,
        p: float = 3.0,
        q: float = 4.0,
    ) -> None:
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            expansion=expansion,
            kernel=kernel,
            chunk=chunk,
            rank=rank,
            bias="lp",
            retention="lq",
            p=p,
            q=q,
        )


@register(
    "yaad",
    kind="mixer",
    paper=PAPER,
    arxiv="2504.13173",
    year=2025,
    applies_to="from scratch",
    small=SMALL,
    claim=(
        "With 0, 20 and 40 % of the shown values wrong, recall 0.978, 0.798 and 0.576 with the coordinate-wise loss "
        "and 0.998, 0.906 and 0.703 with the norm's; the squared error has 0.998, 0.890 and 0.681, linear attention "
        "0.986, 0.911 and 0.724: robustness gains 1 to 2 points with the norm's loss only "
        "(benchmarks/results/claims/miras.json). Multi-query recall, 64 pairs: 0.960, linear attention 0.658 "
        "(benchmarks/results/mqar.json)."
    ),
)
class YaadMixer(MirasBase):
    """A test-time memory with a Huber loss, whose large errors count no more than a learned threshold.

    huber: "huber", "huber-norm" (continuous at the threshold) or "huber-coordinates".    head_dim, expansion, kernel,
    chunk, rank: as in miras.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        expansion: float = 4.0,
        kernel: int = 4,
        chunk: int = 64,
        rank: int | None = 32,
        huber: str = "huber",
    ) -> None:
        self.require(huber in THRESHOLDED[:3], f"huber={huber!r}, allowed: {THRESHOLDED[:3]}")
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            expansion=expansion,
            kernel=kernel,
            chunk=chunk,
            rank=rank,
            bias=huber,
            retention="l2",
        )


@register(
    "memora",
    kind="mixer",
    paper=PAPER,
    arxiv="2504.13173",
    year=2025,
    applies_to="from scratch",
    small=SMALL,
    claim=(
        "Not reproduced: with 0, 20 and 40 % of the shown values wrong, recall 0.121, 0.122 and 0.124, at a rate of "
        "0.005 that the others learn with; the squared error has 0.998, 0.890 and 0.681 "
        "(benchmarks/results/claims/miras.json). Multi-query recall, 64 pairs in 256 tokens, rate 0.00215: 0.894 with "
        "265 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class MemoraMixer(MirasBase):
    """A test-time memory of positive weights on simplices, kept near the past by KL divergence.

    mass: what the weights into an output unit sum to.    head_dim, expansion, kernel, chunk, rank: as in miras.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        expansion: float = 4.0,
        kernel: int = 4,
        chunk: int = 64,
        rank: int | None = 32,
        mass: float = 1.0,
    ) -> None:
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            expansion=expansion,
            kernel=kernel,
            chunk=chunk,
            rank=rank,
            bias="l2",
            retention="kl",
            mass=mass,
        )
