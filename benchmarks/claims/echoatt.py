"""EchoAtt's claim in small: inner layers can share attention weights, first and last layers cannot; distillation closes
most of what sharing costs, and the student is smaller, holds fewer bytes per token and decodes faster.

Similarity of layers, then perplexity on held-out text: of students that are not adjusted, by which pairs of layers
share, and of one that is. Then bytes of the cache, parameters, and seconds of a decode step, teacher against student.

    python benchmarks/claims/echoatt.py [--device cuda] [--length 512] [--steps 300] [--first 6] [--last 6] [--size 2]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from claim import record
from closeness import parser
from keeping import load

from foveate.hf.calibrate import calibrate
from foveate.hf.compat import cache_keyword, new_dynamic_cache
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import MANUAL, PackedText, pack, read_documents
from foveate.lm.echoatt import share_attention
from foveate.lm.echoatt_adjust import adjust
from foveate.lm.stages import perplexity
from foveate.methods.select.echoatt import sharing_groups


def unadjusted(model: Any, test: PackedText, config: ConvertConfig, size: int) -> list[dict[str, Any]]:
    """Perplexity when as many layers share at the beginning, in the middle and at the end of the model."""
    layers = model.config.num_hidden_layers
    share = layers // 5
    places = {
        "none": (),
        "first fifth": sharing_groups(layers, 0, layers - share, size),
        "second fifth": sharing_groups(layers, share, layers - 2 * share, size),
        "third fifth": sharing_groups(layers, 2 * share, layers - 3 * share, size),
        "fourth fifth": sharing_groups(layers, 3 * share, layers - 4 * share, size),
        "last fifth": sharing_groups(layers, layers - share, 0, size),
    }
    rows = []
    for place, groups in places.items():
        student = share_attention(model, groups) if groups else model
        rows.append({"share": place, "groups": groups, "perplexity": perplexity(student, test, config)})
        print(rows[-1], flush=True)
    return rows


def cache_bytes(cache: Any) -> int:
    return sum(each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values))


@torch.no_grad()
def decoding(model: Any, tokens: int, steps: int = 30) -> dict[str, Any]:
    """Median seconds of a decode step after `tokens` tokens, bytes of the cache then, and parameters."""
    cache = new_dynamic_cache(model.config)
    given = {cache_keyword(model): cache, "use_cache": True}
    model(torch.randint(3, 1000, (1, tokens), device=model.device), logits_to_keep=1, **given)
    times = []
    for _ in range(steps):
        wait(model)
        started = time.perf_counter()
        model(torch.tensor([[5]], device=model.device), **given)
        wait(model)
        times.append(time.perf_counter() - started)
    return {
        "tokens": tokens,
        "seconds_per_token": sorted(times)[steps // 2],
        "cache_bytes": cache_bytes(cache),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def speeds(models: dict[str, Any], lengths: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for tokens in lengths:
        for name, model in models.items():
            rows.append({"model": name, **decoding(model, tokens)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    made = parser(__doc__, length=512, seeds=16)
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--first", type=int, default=6)
    made.add_argument("--last", type=int, default=6)
    made.add_argument("--size", type=int, default=2)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--held-out", type=float, default=0.1)
    made.add_argument("--decode", type=int, nargs="+", default=[1024, 4096])
    started, given = time.perf_counter(), made.parse_args()
    model, tokenizer = load(given)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"samples": given.seeds, "length": min(given.length, 256), "progress": False}
        profile = calibrate("echoatt", model, tokenizer, out=f"{folder}/echoatt", **settings)
    precision = "bfloat16" if given.device == "cuda" else "float32"
    _, test = pack(read_documents([MANUAL]), tokenizer, given.length).split(given.held_out)
    config = ConvertConfig(batch=given.batch, precision=precision)
    places = unadjusted(model, test, config, given.size)
    adjusted = adjust(
        model,
        tokenizer,
        progress=False,
        first=given.first,
        last=given.last,
        size=given.size,
        length=given.length,
        held_out=given.held_out,
        distill_steps=given.steps,
        tune_steps=given.steps // 4,
        batch=given.batch,
        precision=precision,
    )
    print(adjusted.perplexity, flush=True)
    rows = speeds({"teacher": model, "student": adjusted.model}, given.decode)
    similarity = profile.tensors["similarity"]
    record(
        "echoatt",
        "inner layers can share attention weights; distillation closes most of the gap",
        given,
        started,
        model=model,
        similarity_to_next=[round(float(each), 4) for each in similarity.diagonal(1)],
        unadjusted=places,
        adjusted={"groups": adjusted.groups, "perplexity": adjusted.perplexity, "losses": adjusted.losses},
        decoding=rows,
    )


if __name__ == "__main__":
    main()
