"""What a layer of a prompt asks of the host: operators of torch and launches of Triton kernels, stock and block-sparse.

    python benchmarks/count_operators.py        writes benchmarks/results/count_operators.json

Counted on the CPU, where Triton's interpreter runs the kernels that a GPU would: two and three layers of a small Llama
of SmolLM2's kind (9 query heads, 3 KV heads), and the difference. Shapes do not change the count. A short layer takes a
GPU less time than the host needs to issue it: there the count says how long a prompt takes (docs/benchmarks.md).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.attention import dispatch
from foveate.attention.backends.triton import availability
from foveate.compare.files import write_atomic
from foveate.hf import apply
from foveate.provenance import command_line, device_name, now, versions

RESULTS = Path(__file__).parent / "results" / "count_operators.json"
TOKENS, METHOD = 512, "flexprefill:tau=0,min_budget=128,max_budget=128"


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(layers: int, method: str | None) -> Counter[str]:
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 32}
    sizes: dict[str, Any] = {"hidden_size": 288, "intermediate_size": 128, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes, num_hidden_layers=layers))
    model = model.eval().to(torch.float16)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.inference_mode():
        if method is None:
            with Counting() as counting:
                model(ids, use_cache=True, logits_to_keep=1)
        else:
            with apply(model, method), Counting() as counting:
                model(ids, use_cache=True, logits_to_keep=1)
    return counting.seen


def main() -> None:
    # What a GPU's calls would choose.
    availability.why_not_device = lambda *_: None  # type: ignore[assignment]
    dispatch.PREFERENCE["cpu"] = dispatch.PREFERENCE["cuda"]
    rows = []
    for method in (None, METHOD):
        layer = operators(3, method) - operators(2, method)
        rows.append({"method": method or "stock", "operators": sum(layer.values()), "which": dict(layer.most_common())})
        print(rows[-1])
    data = {
        "what": "operators of torch per layer of a prompt",
        "device": device_name(torch.device("cpu")),
        "versions": versions(),
        "date": now(),
        "command": command_line(),
        "rows": rows,
    }
    write_atomic(RESULTS, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
