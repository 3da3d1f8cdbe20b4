"""CAB's claims in small: which attention leads depends on the pattern it is used in, efficient attentions stay behind
softmax attention where they read a context, and they cost less time only from some length on.

Every attention of CAB is trained on a small task of each pattern that it declares (see cab_tasks.py), gets CAB's index
with means and deviations over the attentions trained here, and is timed beside softmax attention. The summary sets
this against the paper's leaderboard of 2022-11-16 and its efficiency lengths.

    python benchmarks/claims/cab.py [--device cuda] [--workers 4] [--only softmax local s4d]

The result file is written after every finished row, and rows it holds already are kept. Timing starts when all
training is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import combinations
from statistics import fmean, median, stdev
from typing import Any

import torch
from cab_tasks import TASKS, VANILLA, measured
from claim import each_done, earlier, parser, record

from foveate import registry
from foveate.compare.cab import Metric, efficiency_length, pattern_errors
from foveate.compare.memory import PeakMemory
from foveate.mixers.base import Mixer, create_mixer

NAMES = (
    "softmax",
    "abc",
    "long-short-causal",
    "s4d",
    "lara",
    "nystromformer",
    "probsparse",
    "performer",
    "cosformer",
    "long-short",
    "local",
)
# The index of each attention; softmax stands for the vanilla Transformer's, and in causal-self for FlashAttention.
PAPER = {
    "noncausal-self": {
        "local": 0.978,
        "cosformer": 0.466,
        "long-short": 0.269,
        "softmax": -0.024,
        "lara": -0.032,
        "performer": -0.285,
        "nystromformer": -0.440,
        "probsparse": -0.661,
        "abc": -0.686,
    },
    "causal-self": {"s4d": 0.985, "long-short-causal": 0.617, "softmax": 0.426, "local": -0.239, "abc": -0.623},
    "noncausal-cross": {"softmax": 0.596, "abc": 0.204, "performer": 0.014, "cosformer": -0.815},
    "causal-cross": {"softmax": 0.956, "abc": 0.058, "performer": -1.014},
}
# Tokens from which on an attention takes less time, and less memory, than materialised softmax attention.
PAPER_LENGTHS = {
    "abc": (1877, 70),
    "performer": (2361, 37),
    "lara": (2541, 68),
    "cosformer": (2539, 164),
    "nystromformer": (3045, 94),
    "probsparse": (3450, 281),
    "local": (4195, 1169),
    "long-short": (5652, 342),
    "s4d": (6011, 949),
}
# Softmax attention by a fused kernel, and as CAB's vanilla one with all weights in memory.
FUSED, MATERIALISED = "softmax", "softmax, materialised"
TOLERANCE = 1e-4
CLAIM = (
    "which attention leads depends on the pattern: local attention in noncausal-self, S4D in causal-self, softmax in "
    "both cross patterns; efficient ones take less time only from some thousand tokens on"
)


def arguments() -> argparse.Namespace:
    sizes = {"dim": 128, "layers": 4, "length": 512, "batch": 16, "examples": 64}
    made = parser(
        __doc__, devices=("cpu", "cuda"), steps=400, seed=0, seeds=2, workers=4, longest=8192, rounds=20, **sizes
    )
    made.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    given = made.parse_args()
    ones = dict.fromkeys(("steps", "seeds", "workers", "batch", "examples", "rounds"), 1)
    for name, least in {**ones, "dim": 4, "layers": 2, "length": 2, "longest": 1024}.items():
        if getattr(given, name) < least:
            made.error(f"--{name}: {getattr(given, name)}, allowed: >= {least}")
    if given.dim % 4:
        made.error(f"--dim: {given.dim}, allowed: multiples of 4, the heads")
    return given


def spec_of(name: str, pattern: str) -> str:
    """The mixer's spec for a pattern that it declares."""
    causal = pattern.startswith("causal")
    options = {option.name for option in registry.card(name).options}
    given = ["rotary=false"] if name == "softmax" else []
    given += [f"causal={str(causal).lower()}"] if "causal" in options else []
    return ":".join([name, ",".join(given)]) if given else name


def declares(name: str, pattern: str) -> bool:
    target: Any = registry.card(name).target
    return pattern in target.patterns


def row(name: str, task: str, given: argparse.Namespace) -> dict[str, Any]:
    """One mixer on one task: the mean of its metric over the seeds (None: one is not finite)."""
    began = time.perf_counter()
    pattern = TASKS[task].pattern
    spec = spec_of(name, pattern)
    made: dict[str, Any] = {"mixer": name, "spec": spec, "pattern": pattern, "task": task, "metric": TASKS[task].metric}
    try:
        found = [measured(task, spec, given, seed) for seed in range(given.seed, given.seed + given.seeds)]
    except Exception as error:
        # A mixer that fails is a result, told in its row; the others must not be lost with it.
        made |= {"value": None, "error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    else:
        values = [value for value, _ in found if value is not None]
        made |= {
            "value": fmean(values) if len(values) == len(found) else None,
            "by_seed": [value for value, _ in found],
            "parameters": found[0][1],
        }
    made["seconds"] = round(time.perf_counter() - began, 1)
    print(made, flush=True)
    return made


def rows_of(given: argparse.Namespace, known: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The rows that are not known yet as they are finished, by `--workers` processes that share the device."""
    jobs = [(name, task) for task in TASKS for name in given.only if declares(name, TASKS[task].pattern)]
    return each_done(row, [(*job, given) for job in jobs if job not in known], given.workers)


def indices(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """CAB's index per pattern and mixer, of mixers with a number in every task of the pattern: the mean over tasks of
    sign (value - mean) / deviation, both over these mixers (the sample's deviation)."""
    found: dict[str, dict[str, float]] = {}
    for pattern in PAPER:
        tasks = [task for task in TASKS if TASKS[task].pattern == pattern]
        values = {(each["task"], each["mixer"]): each["value"] for each in rows}
        whole = [name for name in NAMES if all(values.get((task, name)) is not None for task in tasks)]
        if len(whole) < 2:
            continue
        scores: dict[str, list[float]] = {name: [] for name in whole}
        for task in tasks:
            own = [values[task, name] for name in whole]
            # The least deviation is for values that are all alike.
            metric = Metric(task, TASKS[task].metric, TASKS[task].sign, fmean(own), max(stdev(own), 1e-12))
            for name in whole:
                scores[name].append(metric.score(values[task, name]))
        best_first = sorted(whole, key=lambda name: -fmean(scores[name]))
        found[pattern] = {name: round(fmean(scores[name]), 3) for name in best_first}
    return found


def errors_in_patterns(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """How far each mixer is from the patterns that it declares, see `pattern_errors`."""
    torch.manual_seed(given.seed)
    x, context = (torch.randn(2, length, 64, device=given.device) for length in (48, 40))
    found: dict[str, dict[str, float]] = {}
    for name in given.only:
        specs = dict.fromkeys(spec_of(name, pattern) for pattern in PAPER if declares(name, pattern))
        mixers = [create_mixer(spec, dim=64, heads=4).to(given.device).eval() for spec in specs]
        found[name] = {key: value for each in mixers for key, value in pattern_errors(each, x, context).items()}
    return found


@torch.no_grad()
def costs(length: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds and peak bytes of one layer's forward pass over all tokens, both ways: four sequences, 8 heads,
    512 channels, float32. Rounds go over all mixers in turn."""
    mixers: dict[str, Mixer] = {}
    names = [name for name in given.only if declares(name, "noncausal-self") and name != FUSED]
    specs = {FUSED: f"{VANILLA},causal=false", MATERIALISED: f"nystromformer:landmarks={length}"}
    for name, spec in {**specs, **{name: spec_of(name, "noncausal-self") for name in names}}.items():
        # With as many landmarks as tokens, Nystromformer is softmax attention in plain matrix products.
        mixers[name] = create_mixer(spec, dim=512, heads=8).to(given.device).eval()
    x = torch.randn(4, length, 512, device=given.device)
    seconds: dict[str, list[float]] = {name: [] for name in mixers}
    peaks: dict[str, int | None] = {}
    for turn in range(given.rounds + 3):
        for name, mixer in mixers.items():
            wait(given)
            began = time.perf_counter()
            mixer(x)
            wait(given)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    for name, mixer in mixers.items():
        with PeakMemory(torch.device(given.device)) as peak:
            mixer(x)
        peaks[name] = peak.bytes
    medians = {name: median(each) for name, each in seconds.items()}
    made = []
    for name in mixers:
        ratios = {
            "over_fused": medians[name] / medians[FUSED],
            "over_materialised": medians[name] / medians[MATERIALISED],
        }
        made.append({"mixer": name, "length": length, "seconds": medians[name], **ratios, "peak_bytes": peaks[name]})
        print(made[-1], flush=True)
    return made


def wait(given: argparse.Namespace) -> None:
    if given.device == "cuda":
        torch.cuda.synchronize()


def gains(times: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """From how many tokens on each attention costs less than softmax attention (None: not known, or from none on)."""
    found: dict[str, dict[str, float | None]] = {}
    lengths = sorted({each["length"] for each in times})
    if len(lengths) < 3:
        return found
    names = dict.fromkeys(each["mixer"] for each in times)
    cost = {
        (name, what): [each[what] for each in times if each["mixer"] == name]
        for name in names
        for what in ("seconds", "peak_bytes")
    }
    for name in names:
        if name in (FUSED, MATERIALISED):
            continue
        found[name] = {
            "time": efficiency_length(lengths, cost[MATERIALISED, "seconds"], cost[name, "seconds"]),
            "time_fused": efficiency_length(lengths, cost[FUSED, "seconds"], cost[name, "seconds"]),
            "memory": None
            if None in cost[name, "peak_bytes"] + cost[MATERIALISED, "peak_bytes"]
            else efficiency_length(lengths, cost[MATERIALISED, "peak_bytes"], cost[name, "peak_bytes"]),
        }
    return found


def in_order(ours: dict[str, float], paper: dict[str, float]) -> float | None:
    """The share of pairs that stand in the same order; None for fewer than two."""
    pairs = list(combinations([name for name in paper if name in ours], 2))
    same = [(ours[a] - ours[b]) * (paper[a] - paper[b]) > 0 for a, b in pairs]
    return sum(same) / len(same) if same else None


def says(statement: str, held: bool | None, found: Any) -> dict[str, Any]:
    """One of the paper's statements; held: None where something that it speaks of was not measured."""
    return {"statement": statement, "held": held, "found": found}


def about_patterns(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What the leaderboard says."""
    said, places, complete = [], {}, True
    for pattern, paper in PAPER.items():
        ours = {name: value for name, value in found.get(pattern, {}).items() if name in paper}
        whole = len(ours) == len(paper)
        complete, places[pattern] = complete and whole, list(ours)
        first, ahead, now = next(iter(paper)), before_softmax(paper), before_softmax(ours)
        share = in_order(ours, paper)
        said += [
            says(f"{pattern}: {first} leads", next(iter(ours)) == first if whole else None, next(iter(ours), None)),
            says(
                f"{pattern}: ahead of softmax {', '.join(ahead) or 'none'}",
                set(now) == set(ahead) if whole else None,
                now,
            ),
            says(f"{pattern}: the order of all pairs", share == 1 if whole else None, {"pairs_in_order": share}),
        ]
    rest = [[name for name in places[pattern] if name != "softmax"] for pattern in PAPER if pattern.endswith("cross")]
    statement = "abc is last in noncausal-self, and the best but softmax in both cross patterns"
    held = complete and places["noncausal-self"][-1] == "abc" and all(each[0] == "abc" for each in rest)
    return [*said, says(statement, held if complete else None, places)]


def before_softmax(order: dict[str, float]) -> list[str]:
    """Names before softmax in an order that starts with the best; none without it."""
    names = list(order)
    return names[: names.index("softmax")] if "softmax" in names else []


def about_costs(gained: dict[str, dict[str, float | None]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """What the efficiency lengths say."""
    time_, memory = ({name: each[what] for name, each in gained.items()} for what in ("time", "memory"))
    whole = set(gained) == set(PAPER_LENGTHS)
    never = [name for name, length in time_.items() if length is None or length > given.longest]
    # An attention that never gains comes last.
    order = {name: float("inf") if length is None else length for name, length in time_.items()}
    later = [name for name in time_ if memory[name] is None or order[name] <= (memory[name] or 0.0)]
    share = in_order(order, {name: float(length) for name, (length, _) in PAPER_LENGTHS.items()})
    known = whole and None not in memory.values()
    first, last = (min(order, key=order.__getitem__), max(order, key=order.__getitem__)) if whole else (None, None)
    return [
        says(
            f"each takes less time than materialised softmax by {given.longest} tokens",
            not never if whole else None,
            never,
        ),
        says("abc is the first to take less time", first == "abc" if whole else None, first),
        says("s4d is the last to take less time", last == "s4d" if whole else None, last),
        says("efficiency lengths: the order of all pairs", share == 1 if whole else None, {"pairs_in_order": share}),
        says("each saves memory from a shorter length on than time", not later if known else None, later),
    ]


def about_mixers(rows: list[dict[str, Any]], errors: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What CAB asks of an attention before it is tested."""
    vanilla = {each["task"]: each.get("parameters") for each in rows if each["mixer"] == "softmax"}
    added = {
        f"{each['mixer']}, {each['task']}": round(each["parameters"] / vanilla[each["task"]] - 1, 4)
        for each in rows
        if each.get("parameters") and vanilla.get(each["task"])
    }
    larger = {name: share for name, share in added.items() if share > 0.1}
    off = {name: each for name, each in errors.items() if not all(error <= TOLERANCE for error in each.values())}
    return [
        says("none adds more than 10 % of parameters", not larger if added else None, larger),
        says(f"each keeps to its patterns within {TOLERANCE}", not off, off),
    ]


def main() -> None:
    started, given = time.perf_counter(), arguments()
    errors = errors_in_patterns(given)
    rows: list[dict[str, Any]] = [each for each in earlier("cab", given).get("rows", []) if "error" not in each]
    times: list[dict[str, Any]] = []

    def save() -> None:
        found, gained = indices(rows), gains(times)
        record(
            "cab",
            CLAIM,
            given,
            started,
            summary=[*about_patterns(found), *about_costs(gained, given), *about_mixers(rows, errors)],
            indices=found,
            efficiency_lengths=gained,
            errors_in_patterns=errors,
            rows=rows,
            times=times,
        )

    for each in rows_of(given, {(each["mixer"], each["task"]) for each in rows}):
        rows.append(each)
        save()
    for length in (256, 512, 1024, 2048, 4096, 8192):
        if length <= given.longest:
            times += costs(length, given)
            save()
    failed = [f"{each['mixer']} ({each['task']}): {each['error']}" for each in rows if "error" in each]
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
