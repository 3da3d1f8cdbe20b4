"""`foveate tune`: find launch configurations for this GPU; only those that are correct here may be kept.

Every candidate is first judged against float64 on the very shape it is timed for (block-sparse prompts: on a sample of
query rows), then timed by replays of a CUDA graph. The fastest correct one enters the user's table, which kernels read
beside the shipped one; nothing is tuned while a model runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.compare.environment import now, versions
from foveate.compare.progress import showing
from foveate.errors import BackendError, OptionError

GATE = 5e-3
TABLES = ("decode", "blocks", "scan", "delta", "vector")


@dataclass(frozen=True)
class Case:
    """One entry to find: a table's key, its candidates, a call of one and its error."""

    table: str
    key: Any
    candidates: tuple[Any, ...]
    run: Callable[[Any], Tensor]
    judge: Callable[[Tensor], float]


@dataclass(frozen=True)
class Trial:
    """One candidate: microseconds per call, error, or why it failed."""

    table: str
    key: Any
    config: Any
    us: float | None = None
    error: float | None = None
    failed: str | None = None

    @property
    def correct(self) -> bool:
        return self.us is not None

    def entry(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "key": list(self.key) if isinstance(self.key, tuple) else self.key,
            "config": dataclasses.asdict(self.config),
            "error": self.error,
            "us": self.us,
            "versions": versions(),
            "date": now(),
        }


def tune(
    tables: Sequence[str] = TABLES,
    *,
    head_dims: Sequence[int] = (64, 128),
    lengths: Sequence[int] = (4096, 32768, 131072),
    kv_heads: int = 8,
    group: int = 4,
    progress: bool = True,
) -> list[Trial]:
    """Try every candidate for these shapes on the present GPU and keep the fastest correct ones.

    Returns all trials, in order. Raises OptionError for an unknown table; BackendError without a GPU or Triton, or when
    a shape has no correct candidate.
    """
    unknown = [each for each in tables if each not in TABLES]
    if unknown:
        raise OptionError(f"tables={unknown}, allowed: {', '.join(TABLES)}")
    if not torch.cuda.is_available():
        raise BackendError("foveate tune needs a CUDA GPU; there is none here")
    from foveate.attention.backends.triton import tuned

    trials: list[Trial] = []
    device = torch.cuda.get_device_name()
    per_head_dim = {"decode": 2 * len(lengths), "blocks": 2 * len(lengths), "scan": 1, "delta": 1, "vector": 1}
    with showing(progress, sum(per_head_dim[table] for table in tables) * len(head_dims)) as show:
        # One shape's tensors at a time.
        for case in (case for table in tables for case in _cases(table, head_dims, lengths, kv_heads, group)):
            show.now(f"{case.table} {case.key}")
            tried = [_try(case, config) for config in case.candidates]
            show.step(1)
            trials += tried
            correct = [each for each in tried if each.correct]
            if not correct:
                raise BackendError(f"no configuration of {case.table} {case.key} is correct here: {tried[0].failed}")
            best = min(correct, key=lambda each: each.us or math.inf)
            tuned.keep(tuned.file_of(device), device, [best.entry()])
    return trials


def _try(case: Case, config: Any) -> Trial:
    try:
        error = case.judge(case.run(config))
        if not error <= GATE:
            return Trial(case.table, case.key, config, error=error, failed=f"error {error:.2g} > {GATE}")
        return Trial(case.table, case.key, config, us=_time(lambda: case.run(config)), error=error)
    except (RuntimeError, ValueError) as failure:
        # Too much shared memory or too many registers for this GPU: another candidate may fit.
        return Trial(case.table, case.key, config, failed=f"{type(failure).__name__}: {failure}"[:200])


def _time(call: Callable[[], object], calls: int = 5, replays: int = 20) -> float:
    """Median microseconds per call inside a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(calls)]
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    del kept
    return statistics.median(times[2:])


def _cases(table: str, head_dims: Sequence[int], lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    makers = {
        "decode": _decode_cases,
        "blocks": _block_cases,
        "scan": _scan_cases,
        "delta": _delta_cases,
        "vector": _vector_cases,
    }
    for head_dim in head_dims:
        yield from makers[table](head_dim, lengths, kv_heads, group)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _decode_cases(head_dim: int, lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    from foveate.attention import Tokens, attend
    from foveate.attention.backends.triton.configs import DecodeConfig
    from foveate.attention.backends.triton.gather_decode import gather_decode

    candidates = tuple(DecodeConfig(*each) for each in itertools.product((32, 64, 128), (4,), (2, 3), (1, 2, 4, 6)))
    for length, listed in itertools.product(lengths, (False, True)):
        held = 4 * length if listed else length
        q, k, v = _draw(1, kv_heads * group, 1, head_dim), *(_draw(1, kv_heads, held, head_dim) for _ in range(2))
        index = None
        if listed:
            index = (
                torch.stack([torch.randperm(held, device="cuda")[:length] for _ in range(kv_heads)])[None].sort().values
            )
        plan = None if index is None else Tokens(index)
        exact = attend(q.double(), k.double(), v.double(), plan, backend="torch")

        def run(config: Any, q: Tensor = q, k: Tensor = k, v: Tensor = v, index: Tensor | None = index) -> Tensor:
            return gather_decode(q, k, v, index=index, config=config, return_lse=False)[0]

        def judge(found: Tensor, exact: Tensor = exact) -> float:
            return _error(found, exact)

        yield Case("decode", (listed, round(math.log2(length)), head_dim), candidates, run, judge)


def _block_cases(head_dim: int, lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    from foveate.attention import Blocks
    from foveate.attention.backends.triton.block_flash import block_flash_fwd
    from foveate.attention.backends.triton.configs import BlockConfig

    shapes = ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (64, 32, 4, 2))
    candidates = tuple(BlockConfig(*shape, tma=tma) for shape in shapes for tma in (False, True))
    for length, block in itertools.product(lengths, (64, 128)):
        rows = -(-length // block)
        q, k, v = (_draw(1, heads, length, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))
        chosen = torch.rand(1, kv_heads * group, rows, rows, device="cuda") < 0.1
        causal = torch.ones(rows, rows, dtype=torch.bool, device="cuda").tril()
        chosen = (chosen | torch.eye(rows, dtype=torch.bool, device="cuda")) & causal
        plan = Blocks.from_mask(chosen, block_m=block, block_n=block).lower(length, length)
        sample = torch.randperm(length, device="cuda")[:64].sort().values
        exact = _rows_of(q, k, v, chosen, block, sample)

        def run(
            config: Any, q: Tensor = q, k: Tensor = k, v: Tensor = v, plan: Any = plan, block: int = block
        ) -> Tensor:
            if config.block_m > block or block % config.block_n:
                raise ValueError(f"tiles of {config.block_m} x {config.block_n} do not fit blocks of {block}")
            return block_flash_fwd(q, k, v, plan, config=config, return_lse=False)[0]

        def judge(found: Tensor, exact: Tensor = exact, sample: Tensor = sample) -> float:
            return _error(found[:, :, sample], exact)

        yield Case("blocks", (block, round(math.log2(length)), head_dim), candidates, run, judge)


def _rows_of(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, rows: Tensor) -> Tensor:
    """The definition in float64 for some query rows, head by head."""
    keys = torch.arange(k.shape[2], device=q.device)
    made = []
    for head in range(q.shape[1]):
        kv = head * k.shape[1] // q.shape[1]
        scores = q[0, head, rows].double() @ k[0, kv].double().T * q.shape[-1] ** -0.5
        seen = chosen[0, head][rows // block][:, keys // block] & (keys <= rows[:, None])
        made.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0, kv].double())
    return torch.stack(made)[None]


def _scan_inputs(head_dim: int, lengths: Sequence[int], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (of norm 1) and v of a length that no chunk divides: its last chunk is another path of the kernels."""
    q, k, v = (_draw(1, min(lengths) - 47, heads, head_dim) for _ in range(3))
    return q, torch.nn.functional.normalize(k.float(), dim=-1).bfloat16(), v


def _scan_cases(head_dim: int, lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    from foveate.attention.backends.triton.scan_chunk_backward import scan_forward
    from foveate.attention.backends.triton.scan_configs import ScanConfig, width
    from foveate.attention.linear import linear_scan

    candidates = tuple(ScanConfig(*each) for each in itertools.product((64, 128), (64,), (4, 8), (1, 2, 3)))
    q, k, v = _scan_inputs(head_dim, lengths, kv_heads * group)
    exact, _ = linear_scan(q.double(), k.double(), v.double(), backend="torch")

    def run(config: Any) -> Tensor:
        return scan_forward(q, k, v, None, None, head_dim**-0.5, None, False, config)[0]

    yield Case("scan", width(head_dim, head_dim), candidates, run, lambda found: _error(found, exact))


def _delta_cases(head_dim: int, lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    from foveate.attention.backends.triton.delta_launch import delta_forward
    from foveate.attention.backends.triton.scan_configs import DeltaConfig, width
    from foveate.attention.linear import linear_scan

    candidates = tuple(
        DeltaConfig(64, block_v, warps, stages, prepare_registers=registers, sum_v=block_v, sum_warps=warps, per_sm=1)
        for block_v, warps in ((64, 4), (128, 8))
        for stages, registers in itertools.product((1, 2, 3), (None, 168, 128))
        if block_v <= head_dim
    )
    q, k, v = _scan_inputs(head_dim, lengths, kv_heads * group)
    beta = torch.rand(v.shape[:3], device="cuda")
    g = torch.nn.functional.logsigmoid(4 + 1.5 * torch.randn(v.shape[:3], device="cuda"))
    exact, _ = linear_scan(q.double(), k.double(), v.double(), g=g.double(), beta=beta.double(), backend="torch")

    def run(config: Any) -> Tensor:
        return delta_forward(q, k, v, beta, g, None, head_dim**-0.5, None, False, False, config)[0]

    yield Case("delta", width(head_dim, head_dim), candidates, run, lambda found: _error(found, exact))


def _vector_cases(head_dim: int, lengths: Sequence[int], kv_heads: int, group: int) -> Iterator[Case]:
    from foveate.attention.backends.triton.scan_configs import VectorConfig, width
    from foveate.attention.backends.triton.scan_vector import vector_forward
    from foveate.attention.linear import linear_scan

    candidates = tuple(VectorConfig(*each) for each in itertools.product((32, 64), (64,), (4, 8), (1, 2), (4, 8)))
    q, k, v = _scan_inputs(head_dim, lengths, kv_heads * group)
    g = torch.nn.functional.logsigmoid(4 + 1.5 * torch.randn(q.shape, device="cuda"))
    exact, _ = linear_scan(q.double(), k.double(), v.double(), g=g.double(), backend="torch")

    def run(config: Any) -> Tensor:
        return vector_forward(q, k, v, g, None, head_dim**-0.5, None, False, config)[0]

    yield Case("vector", width(head_dim, head_dim), candidates, run, lambda found: _error(found, exact))
