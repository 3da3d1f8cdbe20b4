"""Attention of one decode step on CPU when an eighth of the keys is read, selection included, against dense.

    python benchmarks/select_cpu.py [--rounds 15] [--threads 2]        writes benchmarks/results/select_cpu.json
    python benchmarks/select_cpu.py --record [--tokens 4096]           writes benchmarks/results/select_reuse.json

One layer of SmolLM2's shape (9 query heads, 3 KV heads of 64), synthetic keys. Dense comes first in every round and
all methods take turns within a round, so that they share the machine's load; times are medians over rounds, in ms:
`wall`, and `cpu` of all threads (coarse on some machines). `dense_over_this` is the ratio of the medians of wall time
(of CPU time: `_cpu`). `selection` is the step without its attention call, `gather` the copying of the
chosen keys and values alone (the C++ backend gathers nothing: it reads them where they lie).

Synthetic queries do not say how often TokenSelect keeps a choice. `--record` asks the bundled model: in which of 64
decode steps after a prompt of the manual's text each layer chooses anew, with the method's default options and with a
lower threshold, over the text that follows and over the model's own greedy continuation. The timing run makes choices
in that order, layer after layer, a dense step before each; of these rows all times are means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Rope, Tokens
from foveate.attention.backends.torch_dense import gather_rows
from foveate.attention.dispatch import BACKENDS
from foveate.attention.plan import Plan
from foveate.compare.environment import device_name, load_average, now, versions
from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.hf.models import DEFAULT_NAME, default_model
from foveate.methods import Method, SingleLayer, create
from foveate.methods.base import execute
from foveate.methods.select.tokenselect import TokenSelect
from foveate.methods.step import Step
from foveate.tasks.text import paragraphs

RESULTS = Path(__file__).parent / "results" / "select_cpu.json"
REUSE = Path(__file__).parent / "results" / "select_reuse.json"
HEADS, KV_HEADS, SIZE, LAYERS = 9, 3, 64, 30
SHARE = 8
STEPS = 64
# The released threshold of similarity from which on a choice is kept, and a lower one.
REUSES = (0.9, 0.8)
RECORDED = tuple(f"{text}, reuse={reuse}" for reuse in REUSES for text in ("the manual's text", "greedy continuation"))


class Clock:
    """Wall and CPU time since it was made, in ms."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return 1e3 * (time.perf_counter() - self.wall), 1e3 * (time.process_time() - self.cpu)


@dataclass
class TimedStep(Step):
    """Notes what its attention call reads and takes."""

    plan: Plan | None = None
    attention: tuple[float, float] = (0.0, 0.0)

    def attend(self, plan: Plan | None = None) -> Tensor:
        clock = Clock()
        out = super().attend(plan)
        self.plan, self.attention = plan, clock.read()
        return out


@dataclass
class Subject:
    """A method on one layer whose cache is filled, and its times."""

    name: str
    layer: SingleLayer
    before: Callable[[SingleLayer], None] = lambda layer: None
    total: list[tuple[float, float]] = field(default_factory=list)
    selection: list[tuple[float, float]] = field(default_factory=list)
    gather: list[tuple[float, float]] = field(default_factory=list)
    read: int = 0

    def run(self) -> None:
        k = self.layer.cache.keys
        new = [torch.randn(1, heads, 1, SIZE).to(k.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        made = self.layer.step(*new)
        step = TimedStep(**{name: getattr(made, name) for name in Step.__dataclass_fields__})
        self.before(self.layer)
        clock = Clock()
        execute(self.layer.method, step)
        total = clock.read()
        self.total.append(total)
        self.selection.append((total[0] - step.attention[0], total[1] - step.attention[1]))
        self.read = step.cache.stored
        if isinstance(step.plan, Tokens):
            index = step.plan.index.clamp_min(0)
            self.read = index.shape[-1]
            clock = Clock()
            gather_rows(step.k, index), gather_rows(step.v, index)
            self.gather.append(clock.read())

    def row(self) -> dict[str, Any]:
        made: dict[str, Any] = {"method": self.name, "keys_read": self.read}
        for name in ("total", "selection", "gather"):
            times = getattr(self, name)
            if times and not (name != "total" and self.name == "full"):
                made[f"{name}_ms"] = round(statistics.median(wall for wall, _ in times), 3)
                made[f"{name}_cpu_ms"] = round(statistics.median(cpu for _, cpu in times), 3)
        return made


def filled(method: Method, k: Tensor, v: Tensor, **options: Any) -> SingleLayer:
    layer = SingleLayer(method, rope=Rope(SIZE), **options)
    layer.cache.append(k, v)
    return layer


def forget_choice(layer: SingleLayer) -> None:
    """TokenSelect's next step chooses."""
    if layer.cache.states:
        layer.cache.states[0].served.fill_(-1)


def subjects(tokens: int, dtype: torch.dtype) -> list[Subject]:
    torch.manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, tokens, SIZE).to(dtype) for _ in range(2))
    read = tokens // SHARE
    recycled, full = (create("recycled", budget=read, stride=stride) for stride in (10**6, 1))
    delta = create("delta", pages=read // 16)
    planner, follower = (filled(delta, k, v, layer=index, layers=LAYERS) for index in (2, 3))
    follower.run = planner.run
    # With this threshold a choice is kept until it is forgotten.
    kept = TokenSelect(budget=read - 640, reuse=-1.0)
    return [
        Subject("full", filled(create("full"), k, v)),
        Subject("recycled: recycled step", filled(recycled, k, v)),
        Subject("recycled: full step", filled(full, k, v)),
        Subject("quest", filled(create("quest", budget=read), k, v, layer=2, layers=LAYERS)),
        Subject("delta: planning layer", planner),
        Subject("delta: sparse layer", follower),
        Subject("tokenselect: new choice", filled(kept, k, v), forget_choice),
        Subject("tokenselect: choice kept", filled(kept, k, v)),
        Subject("kinetics", filled(create("kinetics", blocks=(read - 80) // 16), k, v, layer=2, layers=LAYERS)),
    ]


def average(name: str, parts: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """A row that mixes others by their weights."""
    total = sum(weight for weight, _ in parts)
    mixed = {
        key: round(sum(weight * row[key] for weight, row in parts) / total, 3)
        for key in ("total_ms", "total_cpu_ms", "keys_read")
    }
    return {"method": name, **mixed}


def replayed(name: str, made: dict[str, Any], full: Subject, kept: Subject) -> dict[str, Any]:
    """The mean over the steps of a record, a dense step before each."""
    for subject in (full, kept):
        subject.total.clear()
    for anew in "".join(made["anew"]):
        full.run()
        if anew == "1":
            forget_choice(kept.layer)
        kept.run()
    row: dict[str, Any] = {"method": f"tokenselect: {name}", "keys_read": kept.read, "kept_share": made["kept_share"]}
    for part, at in (("", 0), ("_cpu", 1)):
        own, dense = (statistics.fmean(each[at] for each in subject.total) for subject in (kept, full))
        row[f"total{part}_ms"], row[f"dense{part}_ms"] = round(own, 3), round(dense, 3)
        row[f"dense_over_this{part}"] = round(dense / own, 2)
    return row


@torch.inference_mode()
def choices(model: Any, method: TokenSelect, prompt: list[int], text: list[int] | None, steps: int) -> dict[str, Any]:
    """Which of `steps` decode steps choose anew, as a string of 0 and 1 per layer; text: None takes the model's own."""
    made: list[str] = []
    with apply(model, method) as run:
        held = {cache_keyword(model): run.new_cache()}
        logits = model(torch.tensor([prompt]), logits_to_keep=1, **held).logits
        for step in range(steps):
            token = int(logits[0, -1].argmax()) if text is None else text[step]
            logits = model(torch.tensor([[token]]), **held).logits
            states = [store.states[0] for store in run.stats.stores]
            made.append("".join(str(int(state.served[0] == 0)) for state in states))
    layers = ["".join(column) for column in zip(*made)]
    kept = [round(layer.count("0") / steps, 3) for layer in layers]
    return {"kept_share": round(statistics.fmean(kept), 3), "kept_share_by_layer": kept, "anew": layers}


def record(tokens: int, steps: int) -> None:
    model, tokenizer = default_model(dtype="float32", device="cpu")
    ids = tokenizer("\n\n".join(paragraphs(None)))["input_ids"][: tokens + steps]
    prompt, text = ids[:tokens], ids[tokens:]
    found = [choices(model, TokenSelect(reuse=reuse), prompt, each, steps) for reuse in REUSES for each in (text, None)]
    made = {
        "what": "decode steps in which TokenSelect chooses anew (1) or keeps its choice (0), a string per layer",
        "model": DEFAULT_NAME,
        "options": asdict(TokenSelect()),
        "prompt_tokens": tokens,
        "steps": steps,
        **dict(zip(RECORDED, found)),
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "date": now(),
    }
    REUSE.write_text(json.dumps(made, indent=1) + "\n")
    print(REUSE, {name: made[name]["kept_share"] for name in RECORDED})


def rows_of(tokens: int, dtype: torch.dtype, rounds: int, recorded: dict[str, Any]) -> list[dict[str, Any]]:
    measured = subjects(tokens, dtype)
    for number in range(rounds + 2):
        for subject in measured:
            subject.run()
            if number < 2:
                subject.total.clear(), subject.selection.clear(), subject.gather.clear()
    rows = [subject.row() for subject in measured]
    by_name = {row["method"]: row for row in rows}
    dense = by_name["full"]
    steps = [(49.0, by_name["recycled: recycled step"]), (1.0, by_name["recycled: full step"])]
    rows.append(average("recycled: mean of 50 steps", steps))
    layers = [(2.0, dense), (3.0, by_name["delta: planning layer"]), (25.0, by_name["delta: sparse layer"])]
    rows.append(average(f"delta: mean of {LAYERS} layers", layers))
    for row in rows:
        row["dense_over_this"] = round(dense["total_ms"] / row["total_ms"], 2)
        row["dense_over_this_cpu"] = round(dense["total_cpu_ms"] / row["total_cpu_ms"], 2)
    full, kept = measured[0], next(each for each in measured if each.name == "tokenselect: choice kept")
    return [*rows, *(replayed(name, recorded[name], full, kept) for name in RECORDED)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096, help="of the recorded prompt")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.record:
        record(given.tokens, STEPS)
        return
    recorded = json.loads(REUSE.read_text())
    tables = []
    for backend in [name for name in ("torch", "cpp") if name in BACKENDS]:
        # "auto" prefers the C++ kernel where it serves, and leaves the rest to torch.
        os.environ["FOVEATE_BACKEND"] = "torch" if backend == "torch" else "auto"
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (8192, 32768):
                with torch.inference_mode():
                    rows = rows_of(tokens, dtype, given.rounds, recorded)
                tables.append({"backend": backend, "dtype": str(dtype), "tokens": tokens, "rows": rows})
                print(backend, dtype, tokens)
                for row in rows:
                    print("  ", row, flush=True)
    made = {
        "what": "attention of one decode step, one layer, selection included",
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE, "share_read": f"1/{SHARE}"},
        "device": device_name(torch.device("cpu")),
        "threads": given.threads,
        "rounds": given.rounds,
        "versions": versions(),
        "date": now(),
        "loadavg": load_average(),
        "tables": tables,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(made, indent=2) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
