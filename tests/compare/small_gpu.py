"""`foveate bench gpu` at sizes that a CPU runs, and cases that are made up."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from foveate.compare.bench_gpu import GpuBench, Sizes, bench_gpu
from foveate.compare.bench_gpu_attention import AttentionSizes
from foveate.compare.bench_gpu_decode import DecodeSizes
from foveate.compare.bench_gpu_models import ModelSizes
from foveate.compare.bench_gpu_scans import ScanSize
from foveate.compare.bench_gpu_timing import Case, Contender, Job, always

CPU = torch.device("cpu")
TINY = Sizes(
    attention=AttentionSizes(
        heads=4, kv_heads=2, head_dim=16, block=32, dtype=torch.float32, prompt=256, columns=16, learned=128,
        learned_density=0.4, densities=((0.5, 1e9), (0.2, 1e-3)),
    ),
    decode=DecodeSizes(
        heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, cached=256, dense=1e9, lists=((32, 3, 1e9),),
        scores=(2, 300, 20),
    ),
    scans=tuple(
        ScanSize(kind=kind, heads=6, length=150, width=16, dtype=torch.float32, learned=learned)
        for kind, learned in (
            ("linear", False), ("retention", False), ("delta", False), ("gated delta", False), ("gated", True),
            ("gated delta", True),
        )
    ),
    models=ModelSizes(
        shapes={"tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 1, "vocab_size": 64}},
        prompts=(("tiny", 512, 1e-9),), decodes=(("tiny", 1024, None),), dtype=torch.float32, steps=2,
    ),
)  # fmt: skip


def run(tmp_path: Path, *only: str) -> GpuBench:
    return bench_gpu(only, rounds=1, out=tmp_path / "out.json", progress=False, sizes=TINY, device="cpu")


def printed(result: GpuBench) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(result.table())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def made(*contenders: Contender, absent: list[str] | None = None) -> list[Job]:
    return [Job("topk", "made up", lambda: Case("made up", list(contenders), absent or []))]


def contender(name: str, call: Any = lambda i: None, error: float = 0.0, **more: Any) -> Contender:
    return Contender(name=name, open=always(call, lambda got: {"error": error}), judged="made up", **more)
