"""Half of SmolLM2's attention layers become Hedgehog: perplexity on held-out text before and after, and the state.

The held-out text is the last tenth of Python's manual, and the rest is what both stages train on. Training on that text
alone lowers its perplexity, so the unchanged model is finetuned in the same way as well (`control`): what the layers
cost is the difference to it.

    python benchmarks/convert_hedgehog.py [--device cuda] [--minutes 5] [--ratio 0.5] [--to hedgehog]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from foveate.compare.environment import environment, model_facts
from foveate.hf.calibrations.base import Work
from foveate.hf.models import default_model
from foveate.lm.convert import convert
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import MANUAL, pack, read_documents
from foveate.lm.finetune import finetune
from foveate.lm.pretrained import as_hybrid
from foveate.lm.stages import perplexity

RESULT = Path(__file__).parent / "results" / "convert_hedgehog.json"
STATE_LENGTHS = (1024, 8192, 131072)
# Shares of the time: distillation, finetuning, and finetuning of the unchanged model.
SHARES = (0.3, 0.35, 0.35)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="default: CUDA where there is one")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training in all; steps end earlier")
    parser.add_argument("--to", default="hedgehog")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--text", nargs="+", default=[MANUAL], help="text files instead of the manual")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--distill-steps", type=int, default=400)
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--precision", default=None, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def settings(given: argparse.Namespace, device: torch.device) -> ConvertConfig:
    distill_share, finetune_share, _ = SHARES
    return ConvertConfig(
        to=given.to,
        ratio=given.ratio,
        text=tuple(given.text),
        length=given.length,
        batch=given.batch,
        accumulate=1,
        distill_steps=given.distill_steps,
        distill_minutes=given.minutes * distill_share,
        finetune_steps=given.finetune_steps,
        finetune_minutes=given.minutes * finetune_share,
        precision=given.precision or ("bfloat16" if device.type == "cuda" else "float32"),
    )


def control(model: Any, tokenizer: Any, config: ConvertConfig) -> float:
    """Perplexity of the unchanged model after the same finetuning."""
    train, test = pack(read_documents(config.text, config.separator), tokenizer, config.length).split(config.held_out)
    tuned, _ = finetune(as_hybrid(model), (), train, config, Work(None, shown=True))
    return perplexity(tuned, test, config)


def sample(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer("The import statement", return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(made[0])
    return text


def main() -> None:
    started, given = time.perf_counter(), arguments()
    model, tokenizer = default_model(device=given.device)
    config = settings(given, model.device)
    chosen = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    to, layers = chosen.pop("to"), chosen.pop("layers")
    made = convert(model, tokenizer, to, layers=layers, **chosen)
    converted_at = time.perf_counter()
    dense = as_hybrid(model)
    scores = {**made.perplexity, "control": control(model, tokenizer, config)}
    record = {
        "settings": config.as_dict(),
        "environment": environment(model.device),
        "model": model_facts(model),
        "layers": list(made.layers),
        "mixer": made.model.config.mixers[made.layers[0]],
        "perplexity": scores,
        "finetuned_over_base": scores["finetuned"] / scores["base"],
        "finetuned_over_control": scores["finetuned"] / scores["control"],
        "steps": {stage: len(losses) for stage, losses in made.losses.items()},
        "losses": {stage: losses[:: max(1, len(losses) // 50)] for stage, losses in made.losses.items()},
        "state_bytes": {
            str(length): {"base": dense.state_bytes(1, length), "converted": made.model.state_bytes(1, length)}
            for length in STATE_LENGTHS
        },
        "sample": sample(made.model, tokenizer),
        "seconds": {
            "conversion": round(converted_at - started, 1),
            "all": round(time.perf_counter() - started, 1),
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: record[name] for name in ("perplexity", "finetuned_over_base", "finetuned_over_control")}))
    print(given.out)


if __name__ == "__main__":
    main()
