"""The command line. Data goes to stdout, everything else to stderr; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.errors import BackendError, DataError, FoveateError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Efficient attention for the models people already use.",
)

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

Model = Annotated[str | None, typer.Option(help="folder or hub name; default: the bundled SmolLM2-135M-Instruct")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="shell wildcards, e.g. '*kv*'")] = "*",
    kind: Annotated[str | None, typer.Option(help="only this kind, e.g. keep, select, mixer, task")] = None,
    as_json: AsJson = False,
) -> None:
    """List the mechanisms in the registry."""
    from foveate import registry

    found = [registry.card(name) for name in registry.names(pattern, kind=kind)]
    if as_json:
        _print_json([card.as_dict() for card in found])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "year", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for card in found:
        table.add_row(card.name, card.kind, str(card.year), card.summary)
    _stdout().print(table)


@app.command()
def show(name: str, as_json: AsJson = False) -> None:
    """Show one mechanism: paper, options with their bounds, the measured claim."""
    from foveate import registry

    card = registry.card(name)
    if as_json:
        _print_json(card.as_dict())
        return
    out = _stdout()
    link = f" (arXiv {card.arxiv})" if card.arxiv else ""
    out.print(f"[bold]{card.name}[/bold]  {card.kind}: {card.paper}{link}, {card.year}", highlight=False)
    out.print(card.summary, highlight=False)
    for option in card.options:
        default = "required" if option.required else f"default {option.default!r}"
        out.print(
            f"  {option.name}: {option.type}, {default}; {option.bounds}. {option.help}", highlight=False, markup=False
        )
    if card.calibration:
        out.print(f"calibration: foveate calibrate {card.calibration}", highlight=False)
    if card.claim:
        out.print(f"claim here: {card.claim}", highlight=False, markup=False)


@app.command()
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
    from foveate.hf.models import load_model

    chosen = _words(methods) or list(DEMO_METHODS)
    wanted = _words(tasks) or ([] if data else list(DEMO_TASKS))
    if data is not None:
        wanted.append(f"data-file:path={data}")
    sizes = _numbers(lengths)
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
        break_even_lengths=_numbers(break_even),
    )
    comparison.save()
    if json_path is not None:
        comparison.to_json(json_path)
    _stdout().print(comparison.table())
    _stderr().print(f"wrote {out / 'results.json'} and {out / 'report.html'}")


@app.command()
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

    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text or not text.strip():
        raise DataError("the prompt is empty; give it as an argument or on stdin")
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
    with apply(loaded, method) as run:
        loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)
        if stats:
            _stderr().print(str(run.stats), highlight=False)


@app.command()
def calibrate(
    name: Annotated[str, typer.Argument(help="which calibration, e.g. duo")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="folder of the profile; default: the user's cache")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="setting=value, several times")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Calibrate a method for a model and save its profile."""
    from foveate.hf.calibrate import calibrate as run_calibration
    from foveate.hf.models import load_model
    from foveate.options import parse_spec

    _, given = parse_spec(f"{name}:{','.join(settings or [])}")
    loaded, tokenizer = load_model(model, dtype=dtype)
    profile = run_calibration(name, loaded, tokenizer, out=out, **given)
    _stdout().print(f"{profile.kind} profile for {profile.model.model_type}, {profile.model.layers} layers")


@app.command()
def probe(
    name: Annotated[str, typer.Argument(help="which probe, e.g. retrieval-heads")],
    model: Model = None,
    as_json: AsJson = False,
    dtype: Dtype = "float32",
) -> None:
    """Measure attention: a table of layers and heads."""
    from foveate.hf.models import load_model
    from foveate.hf.probe import probe as run_probe

    loaded, tokenizer = load_model(model, dtype=dtype)
    result = run_probe(loaded, name, tokenizer=tokenizer)
    if as_json:
        _print_json(result.as_dict())
    else:
        _stdout().print(str(result), highlight=False)


@app.command()
def train(config: Annotated[Path, typer.Argument(help="a TOML file, see docs/training.md")]) -> None:
    """Train a language model of foveate's mixers."""
    from foveate.lm.train import TrainConfig
    from foveate.lm.train import train as run_training

    result = run_training(TrainConfig.read(config))
    _print_json(result)


@app.command()
def convert(
    model: Annotated[str | None, typer.Argument(help="folder or hub name; default: the bundled model")] = None,
    to: Annotated[str, typer.Option(help="the mixer that takes the attention layers' place")] = "hedgehog",
    layers: Annotated[str | None, typer.Option(help="which layers, e.g. 1,3,5; default: by ratio")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="text files to train on; default: Python's manual")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the recipe, several")] = None,
    out: Annotated[Path, typer.Option(help="folder of the converted model")] = Path("foveate-converted"),
    dtype: Dtype = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: as the model comes")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn attention layers of a pretrained model into linear mixers: distillation, then LoRA."""
    from foveate.lm.convert import run_convert

    made = run_convert(
        model=model,
        to=to,
        layers=layers,
        text=[str(each) for each in text or ()],
        settings=settings or (),
        out=out,
        dtype=dtype,
        device=device,
        progress=not as_json,
    )
    if as_json:
        _print_json(made.as_dict())
    else:
        _stdout().print(str(made), highlight=False)


@app.command()
def study(
    mixers: Annotated[str | None, typer.Option(help="specs separated by spaces or ';'; default: all causal")] = None,
    task: Annotated[str, typer.Option(help="mqar or language")] = "mqar",
    ratios: Annotated[str, typer.Option(help="hybrids: layers per one of full attention, e.g. 3,1")] = "",
    text: Annotated[list[str] | None, typer.Option(help="for language: text files")] = None,
    out: Annotated[Path, typer.Option(help="folder for cells, study.json and study.html")] = Path("foveate-study"),
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    minutes: Annotated[float | None, typer.Option(help="when to stop; what is missing is listed")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of the study, several")] = None,
) -> None:
    """Train small models of mixers and of hybrids: recall or perplexity against bytes of state."""
    from foveate.compare.study import study_command

    done = study_command(
        _words(mixers),
        task=task,
        ratios=_numbers(ratios, "--ratios"),
        text=text or (),
        out=out,
        workers=workers,
        minutes=minutes,
        device=device,
        settings=settings or (),
    )
    _stdout().print(done.table())


@app.command()
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
        from foveate.compare import bench_gpu

        if model is not None or methods is not None:
            raise DataError(
                "bench gpu measures fixed shapes: it takes --only, --rounds and --out, no --model or --methods"
            )
        measured = bench_gpu.bench_gpu(
            _words((only or "").replace(",", " ")) or None,
            rounds=rounds or bench_gpu.ROUNDS,
            out=out or bench_gpu.DEFAULT_PATH,
        )
        _stdout().print(measured.table())
        _stderr().print(f"wrote {measured.path}")
        if measured.stopped is not None:
            raise BackendError(f"{measured.stopped}; the {len(measured.rows)} rows until then are kept")
        return
    if name != "decode":
        raise DataError(f"there is no benchmark {name!r}; there is: decode, gpu (more under benchmarks/)")
    if only is not None:
        raise DataError("--only names parts of bench gpu; bench decode takes --methods")
    from foveate.compare.bench import bench as run_bench
    from foveate.hf.models import load_model

    loaded, _ = load_model(model, dtype=dtype)
    chosen = _words(methods) or ["full", f"snapkv:budget={length // 4}"]
    result = run_bench(loaded, methods=chosen, length=length, rounds=rounds or 3)
    _stdout().print(result.table())
    if out is not None:
        result.to_json(out)


@app.command()
def tune(
    tables: Annotated[str, typer.Option(help="which kernels: decode, blocks, scan")] = "decode blocks scan",
    head_dims: Annotated[str, typer.Option(help="head widths, separated by commas")] = "64,128",
    lengths: Annotated[str, typer.Option(help="numbers of keys, separated by commas")] = "4096,32768,131072",
    as_json: AsJson = False,
) -> None:
    """Find launch configurations for this GPU; only those that are correct here are kept."""
    from foveate.compare.tune import tune as run_tuning

    trials = run_tuning(
        _words(tables), head_dims=_numbers(head_dims, "--head-dims"), lengths=_numbers(lengths), progress=not as_json
    )
    if as_json:
        _print_json([{**each.entry(), "failed": each.failed} for each in trials])
        return
    for each in trials:
        found = each.failed or f"{each.us:.1f} us, error {each.error:.1e}"
        _stdout().print(f"{each.table} {each.key} {each.config}: {found}", highlight=False, markup=False)


def _words(text: str | None) -> list[str]:
    return [each for each in (text or "").replace(";", " ").split() if each]


def _numbers(text: str, option: str = "--lengths") -> list[int]:
    try:
        return [int(each) for each in text.split(",") if each.strip()]
    except ValueError:
        raise DataError(f"{option} {text!r}: give whole numbers separated by commas, e.g. 1024,4096") from None


def _stdout() -> Any:
    from rich.console import Console

    return Console()


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def main() -> None:
    """Entry point: errors of the user's are one line on stderr and exit code 2."""
    try:
        app(standalone_mode=False)
    except FoveateError as error:
        sys.stderr.write(f"foveate: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("foveate: interrupted; what was finished is kept\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        # Usage errors of the option parser know how to say themselves; anything else is a bug and shows its trace.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            sys.stderr.write(f"foveate: {error.format_message()}\n")
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
