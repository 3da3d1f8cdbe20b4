"""Recall against bytes of state, for all causal mixers and some hybrids: multi-query associative recall.

    python benchmarks/mqar_study.py --device cuda --workers 8        writes benchmarks/results/mqar{,_hybrids}.json

Two studies of 64 pairs at length 256. "mixers": two layers, a short convolution and the mixer. "hybrids": five layers,
a convolution and four of a mixer alone, or with one layer of full attention after every three, or after every one.
Cells, and a page with the plot, are kept in --cells: what --minutes did not suffice for, a second run goes on with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from foveate.compare.study import causal_mixers, make_entries, run_study
from foveate.compare.study_fit import StudyConfig
from foveate.compare.study_report import Study
from foveate.errors import MissingPackageError, OptionError

RESULTS = Path(__file__).parent / "results"
RATE = 0.00215
# The ones that matter most come first: when time is short, those after them are missing.
NAMED = (
    "softmax",
    "softmax:window=16",
    "softmax:window=64",
    "linear",
    "based",
    "gated-deltanet",
    "deltanet",
    "gla",
    "hgrn2",
    "retnet",
    "lightning",
    "mamba2",
    # One head, so one group of heads.
    "rat:groups=1,chunk=2",
    "rat:groups=1,chunk=4",
    "rat:groups=1",
    "hedgehog",
    "titans-memory",
    "titans-mac",
    "titans-mag",
    "titans-mal",
    "baseconv",
    "baseconv:kernel=none,max_length=256",
    "aaren",
)
SHARED = ("device", "workers", "rates", "length", "pairs", "vocab", "stages", "steps", "batch", "pool", "test", "seed")
HYBRIDS = ("softmax", "linear", "retnet", "gla", "hgrn2", "gated-deltanet")


def mixers(config: StudyConfig) -> list[str]:
    """The named ones, then every other causal mixer of the registry that can be of this size."""
    named = {spec.partition(":")[0] for spec in NAMED}
    found = list(NAMED)
    for name in causal_mixers():
        if name in named:
            continue
        try:
            make_entries([name], (), config)
        except OptionError as error:
            print(f"left out: {error}")
        else:
            found.append(name)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--mixers", nargs="+", help="specs; default: all causal ones")
    parser.add_argument("--hybrids", nargs="*", default=list(HYBRIDS), help="mixers of the second study; none: skip it")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=6.0, help="for both studies; the first has three quarters")
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool", type=int, default=8192)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=Path, default=Path("/tmp/foveate-mqar"), help="folder of finished trainings")
    parser.add_argument("--out", type=Path, default=RESULTS / "mqar.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    shared = {name: value for name, value in vars(given).items() if name in SHARED}
    first = 0.75 if given.hybrids else 1.0
    chosen = given.mixers or mixers(StudyConfig(device=given.device))
    alone = run_study(chosen, minutes=first * given.minutes, out=given.cells / "mixers", layers=2, **shared)
    show("mixers", alone, given)
    if given.hybrids:
        minutes = 0.25 * given.minutes
        mixed = run_study(
            given.hybrids, ratios=(3, 1), minutes=minutes, out=given.cells / "hybrids", layers=5, **shared
        )
        show("hybrids", mixed, given)


def show(name: str, study: Study, given: argparse.Namespace) -> None:
    """Print a study's table and write its numbers and its page."""
    console = Console()
    console.print(study.table())
    for note in study.notes:
        console.print(note)
    unfinished = [each for each in study.missing if not each["why"].startswith("not needed")]
    console.print(f"{name}: {len(study.rows)} trainings, {len(unfinished)} not reached")
    out = given.out if name == "mixers" else given.out.with_stem(f"{given.out.stem}_{name}")
    console.print(study.to_json(out))
    try:
        # The page holds plotly.js, and so is kept beside the cells.
        console.print(study.report(study.out / "study.html"))
    except MissingPackageError as error:
        console.print(f"no page: {error}")


if __name__ == "__main__":
    main()
