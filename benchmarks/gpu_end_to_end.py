"""Whole models on one GPU against the stock dense model: time to first token, and decoding in CUDA graphs.

    python benchmarks/gpu_end_to_end.py [--shapes smollm2 7b] [--lengths 32768 131072] [--out FILE]

Random weights in bfloat16 of SmolLM2-135M's shape and of a 7B Llama's (32 layers, 32 query and 8 KV heads of 128).
Every method's selection is inside its time. Prefill: the stock model by torch's own choice and by its cuDNN kernel,
then block-sparse prompts of about a tenth of the blocks. Decode: the same cache contents, eager and recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import foveate as fv
from foveate.compare.environment import device_name, now, versions
from foveate.hf.compat import cache_keyword

SHAPES = {
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


def made(shape: str) -> Any:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 18)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    # Inverse frequencies must not be rounded to bfloat16.
    half = config.head_dim // 2
    exact = 10000.0 ** (-torch.arange(half, device="cuda", dtype=torch.float32) / half)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq = exact
    return model


def seconds(run: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sparse_prompt(length: int) -> str:
    """FlexPrefill with fixed budgets: c columns and c diagonals of blocks are about 2.5 c / n of the causal ones."""
    tokens = length // 25 // 128 * 128
    return f"flexprefill:tau=0,min_budget={tokens},max_budget={tokens}"


def prefill_rows(model: Any, length: int, rounds: int, brief: bool) -> list[dict[str, Any]]:
    ids = torch.randint(0, 30000, (1, length), device="cuda")
    rows: list[dict[str, Any]] = []

    def prompt() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    def measure(name: str, context: Any) -> None:
        row: dict[str, Any] = {"what": "prefill", "method": name, "length": length}
        try:
            with torch.inference_mode(), context as run:
                prompt()
                torch.cuda.reset_peak_memory_stats()
                row["ttft_s"] = seconds(prompt, rounds)
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
                if hasattr(run, "stats"):
                    row["density"] = run.stats.prefill_density
        except Exception as error:  # a baseline that cannot run is recorded, and the others still run
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
        rows.append(row)
        print(row, flush=True)

    measure("stock", nullcontext())
    if not brief:
        measure("stock, cuDNN", sdpa_kernel([SDPBackend.CUDNN_ATTENTION]))
        measure("stock, FlashAttention", sdpa_kernel([SDPBackend.FLASH_ATTENTION]))
        measure("full", fv.apply(model, "full"))
    measure(sparse_prompt(length), fv.apply(model, sparse_prompt(length)))
    dense = min(row["ttft_s"] for row in rows if row["method"].startswith("stock") and "ttft_s" in row)
    for row in rows:
        if "ttft_s" in row:
            row["speedup_over_stock"] = round(dense / row["ttft_s"], 3)
    return rows


def decode_rows(model: Any, length: int, tokens: int) -> list[dict[str, Any]]:
    """Each method once eagerly and once recorded, on a cache that its own prompt left."""
    ids = torch.randint(0, 30000, (1, length), device="cuda")
    prompt, budget = sparse_prompt(length), length // 8
    rows: list[dict[str, Any]] = []
    methods = [prompt, f"{prompt}+snapkv:budget={budget}", f"{prompt}+adakv:budget={budget}"]
    for method in methods:
        logits = {}
        for graph in (True, False):
            row = {"what": "decode", "method": method, "length": length, "cuda_graph": graph}
            try:
                with torch.inference_mode(), fv.apply(model, method, cuda_graph=graph) as run:
                    held = {cache_keyword(model): run.new_cache()}
                    model(ids, logits_to_keep=1, **held)
                    token = torch.full((1, 1), 7, device="cuda")
                    for _ in range(4):
                        logits[graph] = model(token, **held).logits
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(tokens):
                        model(token, **held)
                    torch.cuda.synchronize()
                    row["s_per_token"] = (time.perf_counter() - start) / tokens
                    row["cache_bytes"] = run.stats.cache_bytes
            except Exception as error:  # recorded, and the others still run
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.empty_cache()
            rows.append(row)
            print(row, flush=True)
        if len(logits) == 2:
            difference = (logits[True].float() - logits[False].float()).norm() / logits[False].float().norm()
            rows[-2]["error_to_eager"] = float(difference)
    dense = next((row["s_per_token"] for row in rows if row["cuda_graph"] and "s_per_token" in row), None)
    for row in rows:
        if dense and row["cuda_graph"] and "s_per_token" in row:
            row["speedup_over_dense_graph"] = round(dense / row["s_per_token"], 3)
    return rows


def stock_decode(model: Any, length: int, tokens: int) -> dict[str, Any]:
    """The untouched model with its own cache, eagerly, on synthetic keys."""
    from transformers import DynamicCache

    config = model.config
    row: dict[str, Any] = {"what": "decode", "method": "stock", "length": length, "cuda_graph": False}
    try:
        cache = DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, layer)
        held, token = {cache_keyword(model): cache}, torch.full((1, 1), 7, device="cuda")
        with torch.inference_mode():
            for _ in range(2):
                model(token, **held)
            row["s_per_token"] = seconds(lambda: model(token, **held), tokens)
    except Exception as error:  # recorded, and the others still run
        row["failed"] = f"{type(error).__name__}: {error}"[:300]
    torch.cuda.empty_cache()
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--brief", action="store_true", help="only the stock model as it chooses its kernel")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_end_to_end.json")
    given = parser.parse_args()
    tables = []
    for shape in given.shapes:
        model = made(shape)
        for length in given.lengths:
            rows = prefill_rows(model, length, given.rounds, given.brief)
            rows += [stock_decode(model, length, 5)] + decode_rows(model, length, given.tokens)
            tables.append({"shape": shape, "length": length, "rows": rows})
            record = {
                "device": device_name(torch.device("cuda")),
                "dtype": "bfloat16",
                "rounds": given.rounds,
                "versions": versions(),
                "date": now(),
                "tables": tables,
            }
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=2) + "\n")
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
