"""Methods on pretrained models: generate, compare, calibrate, probe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.common import AsJson, Dtype, Model, numbers, print_json, stderr, stdout, words
from foveate.errors import DataError, UnknownNameError

DEMO_METHODS = (
    "full",
    "streaming-llm:window=508",
    "snapkv:budget=512,window=16,kernel=7,pool=max",
    "adakv:budget=512",
    "expected-attention:budget=512",
    "tova:budget=512",
    "quest:budget=512",
    "recycled:budget=512",
    "duo",
    "flexprefill+snapkv:budget=512+quest:budget=128",
)
DEMO_TASKS = ("passkey", "niah-single", "multi-turn", "perplexity")


def compare(
    model: Model = None,
    methods: Annotated[
        str | None, typer.Option(help="specs separated by spaces or ';'; 'full snapkv:budget=256'")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks separated by spaces or ';'")] = None,
    lengths: Annotated[str, typer.Option(help="prompt lengths in tokens, separated by commas")] = "1024",
    seeds: Annotated[int, typer.Option(help="examples per cell", min=1)] = 2,
    data: Annotated[Path | None, typer.Option(help="a JSONL file with context, question, answers")] = None,
    out: Annotated[Path, typer.Option(help="folder for results.json and report.html")] = Path("foveate-report"),
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the results here")] = None,
    query_aware: Annotated[
        bool, typer.Option("--query-aware/--query-agnostic", help="is the question there when the cache is compressed?")
    ] = True,
    dtype: Dtype = "bfloat16",
    stride: Annotated[int, typer.Option(help="perplexity: tokens scored per step", min=1)] = 8,
    break_even: Annotated[
        str, typer.Option(help="prompt lengths timed to find where each method breaks even, e.g. 512,4096")
    ] = "",
) -> None:
    """Compare methods with the dense model: quality, latency, memory, bytes, density."""
    from foveate.compare import compare as run_comparison
    from foveate.compare.files import check_file
    from foveate.compare.matrix import Matrix
    from foveate.hf.models import load_model

    chosen = words(methods) or list(DEMO_METHODS)
    wanted = words(tasks) or ([] if data else list(DEMO_TASKS))
    if data is not None:
        wanted.append(f"data-file:path={data}")
    sizes = numbers(lengths)
    extra = numbers(break_even, "--break-even")
    # Mistakes are told before a model is loaded.
    Matrix.of(chosen, wanted, sizes, seeds)
    if json_path is not None:
        check_file(json_path)
    loaded, tokenizer = load_model(model, dtype=dtype)
    comparison = run_comparison(
        loaded,
        tokenizer,
        methods=chosen,
        tasks=wanted,
        lengths=sizes,
        seeds=seeds,
        query_aware=query_aware,
        out=str(out),
        stride=stride,
        break_even_lengths=extra,
    )
    comparison.save()
    if json_path is not None:
        comparison.to_json(json_path)
    stdout().print(comparison.table())
    stderr().print(f"wrote {out / 'results.json'} and {out / 'report.html'}")


def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; '-' or nothing reads stdin")] = None,
    model: Model = None,
    method: Annotated[str, typer.Option(help="a method's spec")] = "full",
    chat: Annotated[bool, typer.Option(help="use the tokenizer's chat template")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.0,
    dtype: Dtype = "bfloat16",
    stats: Annotated[bool, typer.Option(help="print what was stored and read, on stderr")] = True,
) -> None:
    """Generate text with a method, streaming it to stdout."""
    from transformers import TextStreamer

    from foveate.hf import apply
    from foveate.hf.models import load_model
    from foveate.methods import create

    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text or not text.strip():
        raise DataError("the prompt is empty; give it as an argument or on stdin")
    chosen = create(method)
    loaded, tokenizer = load_model(model, dtype=dtype)
    if chat:
        if tokenizer.chat_template is None:
            raise DataError("this tokenizer has no chat template; leave --chat away")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt").to(loaded.device)
    options: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": tokenizer.eos_token_id}
    if temperature > 0:
        options["temperature"] = temperature
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with apply(loaded, chosen) as run:
        loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
        if stats:
            stderr().print(str(run.stats), highlight=False)


def calibrate(
    name: Annotated[str, typer.Argument(help="which calibration, e.g. duo")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="folder of the profile; default: the user's cache")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="setting=value, several times")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Calibrate a method for a model and save its profile."""
    from foveate.hf.calibrate import calibrate as run_calibration
    from foveate.hf.calibrate import calibration_names
    from foveate.hf.models import load_model
    from foveate.methods.profile import check_target
    from foveate.options import nearest, parse_spec

    _, given = parse_spec(f"{name}:{','.join(settings or [])}")
    if name not in calibration_names():
        raise UnknownNameError(f"there is no calibration {name!r}{nearest(name, calibration_names())}")
    if out is not None:
        check_target(out)
    loaded, tokenizer = load_model(model, dtype=dtype)
    profile = run_calibration(name, loaded, tokenizer, out=out, **given)
    stdout().print(f"{profile.kind} profile for {profile.model.model_type}, {profile.model.layers} layers")


def probe(
    name: Annotated[str, typer.Argument(help="which probe, e.g. retrieval-heads, or its spec")],
    model: Model = None,
    as_json: AsJson = False,
    dtype: Dtype = "float32",
) -> None:
    """Measure attention: a table of layers and heads."""
    from foveate import registry
    from foveate.hf.models import load_model
    from foveate.hf.probe import probe as run_probe
    from foveate.options import parse_spec

    registry.card(parse_spec(name)[0], kind="probe")
    registry.create(name)
    loaded, tokenizer = load_model(model, dtype=dtype)
    result = run_probe(loaded, name, tokenizer=tokenizer)
    if as_json:
        print_json(result.as_dict())
    else:
        stdout().print(str(result), highlight=False)
