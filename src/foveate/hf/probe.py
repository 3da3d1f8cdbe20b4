"""probe: measure attention of a transformers model."""

from __future__ import annotations

from typing import Any

from foveate import options, registry
from foveate.errors import OptionError, UnknownNameError
from foveate.hf.modules import check_model
from foveate.hf.subject import ModelSubject
from foveate.probes.base import HeadTable, Probe
from foveate.tasks.text import paragraphs


def probe(model: Any, name: str, *, tokenizer: Any = None, text: str | None = None, **given: Any) -> HeadTable:
    """Measure attention of a model, without N x N weights.

        heads = foveate.probe(model, "retrieval-heads", tokenizer=tokenizer)
        print(heads.top(10))

    Args:
        model: a transformers causal LM; it is as it was afterwards.
        name: a probe, or its spec ("echo-heads:tokens=500"); `foveate list --kind probe` lists them.
        tokenizer: the model's, for probes that need one.
        text: a UTF-8 file of filler prose; default: the English prose of Python's manual.
        **given: the probe's options.
    Returns:
        tables of scores [layers, Hq].
    """
    bare, _ = options.parse_spec(name)
    if not issubclass(registry.card(bare).target, Probe):
        known = registry.names(kind="probe")
        raise UnknownNameError(f"{bare!r} is a {registry.card(bare).kind}, not a probe; probes are: {', '.join(known)}")
    made: Probe = registry.create(name, **given)
    check_model(model)
    if made.needs_tokenizer and tokenizer is None:
        raise OptionError(f"probe {bare!r} reads and writes text; give tokenizer=, the model's own")
    filler = paragraphs(text) if made.needs_tokenizer else ()
    return made.measure(ModelSubject(model), tokenizer, filler)
