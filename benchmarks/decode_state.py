"""Time and bytes of decoding a token after 1k to 64k tokens, for every mixer that claims a constant state.

    python benchmarks/decode_state.py                  writes benchmarks/results/decode_state.json

One layer, one sequence, float32. A state is made by reading that many random tokens in chunks of 1,024. Where that
would take longer than --prefill-seconds, the state after the longest prefill done is used with its position set to the
length ("moved" in the file): its time is right if the state's size is, but its bytes are then no evidence. Full
attention, for comparison, has its first keys and values repeated up to the length ("repeated").

Each round decodes one more token at every length in turn, so that a change of the machine's load falls on all lengths.
Times are quantiles over rounds. `ratio` is the 20 % quantile at a length over that at the shortest: other processes
only ever add time, so the quicker rounds say more about the mixer than the median does.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import device_name, load_average, now, versions
from foveate.compare.files import document, write_atomic
from foveate.compare.study import causal_mixers
from foveate.mixers.base import Mixer, create_mixer
from foveate.mixers.softmax.rotary import SoftmaxMixer, SoftmaxState

RESULTS = Path(__file__).parent / "results" / "decode_state.json"
CHUNK = 1024
COMPARED = ("softmax", "softmax:window=256")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--mixers", nargs="+", help="specs; default: full attention and all with a constant state")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help=f"times {CHUNK}")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=33, help="tokens decoded at each length; the first is not timed")
    parser.add_argument("--prefill-seconds", type=float, default=5.0, help="of one mixer, after its shortest length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if any(each % CHUNK or each < CHUNK for each in given.lengths):
        parser.error(f"--lengths: multiples of {CHUNK}")
    given.lengths = sorted(given.lengths)
    return given


@torch.no_grad()
def main() -> None:
    given = arguments()
    if given.device == "cpu":
        torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for mixer in made(given):
        rows += measured(mixer, given)
        print(f"{rows[-1]['mixer']:24} {rows[-1]['ratio']:6.2f}  {rows[-1]['state_bytes']:>12,} B  {rows[-1]['made']}")
    result = {
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
        "environment": {
            "device": device_name(torch.device(given.device)),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "date": now(),
            "loadavg": load_average(),
            "seconds": round(time.perf_counter() - started, 1),
        },
        "rows": rows,
    }
    print(write_atomic(given.out, document(result)))


def made(given: argparse.Namespace) -> Iterator[tuple[str, Mixer]]:
    """One mixer after the other: all of them at once, with their states, need not fit."""
    for spec in given.mixers or [*COMPARED, *(name for name in causal_mixers() if name not in COMPARED)]:
        torch.manual_seed(given.seed)
        mixer = create_mixer(spec, dim=given.dim, heads=given.heads).to(given.device).eval()
        if mixer.constant_state or given.mixers or spec in COMPARED:
            yield spec, mixer


def measured(named: tuple[str, Mixer], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per length."""
    spec, mixer = named
    states = dict(prefilled(mixer, given))
    held = {length: state.bytes() for length, (state, _) in states.items()}
    times = decoded(mixer, {length: state for length, (state, _) in states.items()}, given)
    quantiles = {length: [1e6 * each for each in statistics.quantiles(times[length], n=10)] for length in given.lengths}
    rows = []
    for length in given.lengths:
        low, middle, high = (quantiles[length][place] for place in (1, 4, 7))
        rows.append(
            {
                "mixer": spec,
                "tokens": length,
                "made": states[length][1],
                "state_bytes": held[length],
                "bytes_per_token": round(held[length] / length, 3),
                "microseconds": {"20%": round(low, 1), "50%": round(middle, 1), "80%": round(high, 1)},
                "ratio": round(low / quantiles[given.lengths[0]][1], 3),
            }
        )
    return rows


def prefilled(mixer: Mixer, given: argparse.Namespace) -> Iterator[tuple[int, tuple[Any, str]]]:
    """(length, (state after so many tokens, how it was made)), in ascending order."""
    generator = torch.Generator().manual_seed(given.seed)
    state, done, seconds, spent, way = None, 0, 0.0, 0.0, "prefill"
    for length in given.lengths:
        chunks = (length - done) // CHUNK
        if state is not None and way == "prefill" and spent + chunks * seconds > given.prefill_seconds:
            way = "repeated" if isinstance(mixer, SoftmaxMixer) and mixer.window is None else "moved"
        if way != "prefill":
            yield length, (stretched(state, length, way), way)
            continue
        for _ in range(chunks):
            x = torch.randn(1, CHUNK, given.dim, generator=generator).to(given.device)
            started = time.perf_counter()
            state = mixer(x, state=state)[1]
            wait(given)
            seconds = time.perf_counter() - started
            spent += seconds if done else 0.0
            done += CHUNK
        yield length, (state, way)


def stretched(state: Any, length: int, way: str) -> Any:
    """The state as if it stood after `length` tokens."""
    state = dataclasses.replace(state, position=torch.full_like(state.position, length))
    if way == "moved" or not isinstance(state, SoftmaxState):
        return state
    times = length // state.keys.shape[2]
    return dataclasses.replace(
        state,
        keys=state.keys.repeat(1, 1, times, 1),
        values=state.values.repeat(1, 1, times, 1),
        length=torch.full_like(state.length, length),
    )


def decoded(mixer: Mixer, states: dict[int, Any], given: argparse.Namespace) -> dict[int, list[float]]:
    """Seconds of each token by length, a round over all lengths at a time."""
    times: dict[int, list[float]] = {length: [] for length in states}
    for number in range(given.rounds):
        token = torch.randn(1, 1, given.dim, device=given.device)
        for length in states:
            wait(given)
            started = time.perf_counter()
            _, states[length] = mixer(token, state=states[length])
            wait(given)
            # The first token warms caches up.
            times[length] += [time.perf_counter() - started] if number else []
    return times


def wait(given: argparse.Namespace) -> None:
    if given.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
