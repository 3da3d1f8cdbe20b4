"""Speed: bench, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.common import AsJson, Dtype, Model, numbers, print_json, stderr, stdout, words
from foveate.errors import BackendError, DataError


def bench(
    name: Annotated[
        str, typer.Argument(help="decode: methods on a model; gpu: every kernel beside baselines")
    ] = "decode",
    model: Model = None,
    length: Annotated[int, typer.Option(min=64, help="decode: tokens in the cache")] = 8192,
    methods: Annotated[str | None, typer.Option(help="decode: specs separated by spaces or ';'")] = None,
    dtype: Dtype = "bfloat16",
    only: Annotated[str | None, typer.Option(help="gpu: some of prefill,decode,topk,models,scans,train")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="samples per time; default 3, for gpu 5")] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the JSON here; default for gpu: foveate-bench-gpu.json")
    ] = None,
) -> None:
    """Time methods against the stock model, or (gpu) kernels and models against the strongest baselines; one run."""
    if name == "gpu":
        if model is not None or methods is not None:
            raise DataError(
                "bench gpu measures fixed shapes: it takes --only, --rounds and --out, no --model or --methods"
            )
        _bench_gpu(only, rounds, out)
    elif name == "decode":
        if only is not None:
            raise DataError("--only names parts of bench gpu; bench decode takes --methods")
        _bench_decode(model, dtype, words(methods) or ["full", f"snapkv:budget={length // 4}"], length, rounds, out)
    else:
        raise DataError(f"there is no benchmark {name!r}; there is: decode, gpu (more under benchmarks/)")


def _bench_gpu(only: str | None, rounds: int | None, out: Path | None) -> None:
    from foveate.compare import bench_gpu

    measured = bench_gpu.bench_gpu(
        words((only or "").replace(",", " ")) or None,
        rounds=rounds or bench_gpu.ROUNDS,
        out=out or bench_gpu.DEFAULT_PATH,
    )
    stdout().print(measured.table())
    stderr().print(f"wrote {measured.path}")
    if measured.stopped is not None:
        raise BackendError(f"{measured.stopped}; the {len(measured.rows)} rows until then are kept")


def _bench_decode(
    model: str | None, dtype: str, methods: list[str], length: int, rounds: int | None, out: Path | None
) -> None:
    from foveate.compare.bench import bench as run_bench
    from foveate.compare.files import check_file
    from foveate.hf.models import load_model
    from foveate.methods import create

    for spec in methods:
        create(spec)
    if out is not None:
        check_file(out)
    loaded, _ = load_model(model, dtype=dtype)
    result = run_bench(loaded, methods=methods, length=length, rounds=rounds or 3)
    stdout().print(result.table())
    if out is not None:
        result.to_json(out)


def tune(
    tables: Annotated[
        str, typer.Option(help="which kernels: decode, blocks, scan, delta, vector")
    ] = "decode blocks scan delta vector",
    head_dims: Annotated[str, typer.Option(help="head widths, separated by commas")] = "64,128",
    lengths: Annotated[str, typer.Option(help="numbers of keys, separated by commas")] = "4096,32768,131072",
    as_json: AsJson = False,
) -> None:
    """Find launch configurations for this GPU; only those that are correct here are kept."""
    from foveate.compare.tune import tune as run_tuning

    trials = run_tuning(
        words(tables), head_dims=numbers(head_dims, "--head-dims"), lengths=numbers(lengths), progress=not as_json
    )
    if as_json:
        print_json([{**each.entry(), "failed": each.failed} for each in trials])
        return
    for each in trials:
        found = each.failed or f"{each.us:.1f} us, error {each.error:.1e}"
        stdout().print(f"{each.table} {each.key} {each.config}: {found}", highlight=False, markup=False)
