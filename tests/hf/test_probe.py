"""probe: by name, with options, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import DataError, OptionError, UnknownNameError
from foveate.hf.probe import probe
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer


def test_probe_by_spec_and_by_options() -> None:
    model = tiny()
    by_spec = probe(model, "echo-heads:tokens=8,repeats=3")
    by_options = probe(model, "echo-heads", tokens=8, repeats=3)
    assert torch.equal(by_spec.scores(), by_options.scores())
    assert by_spec.facts["tokens"] == 8


def test_a_model_that_answers_nothing_says_so() -> None:
    with pytest.raises(DataError, match="answered none of the 2 needle questions"):
        probe(tiny(), "retrieval-heads", tokenizer=ToyTokenizer(), needles=1, lengths=1, depths=2, max_length=256)


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="'snapkv' is a keep, not a probe; probes are: "):
        probe(tiny(), "snapkv")
    with pytest.raises(OptionError, match="give tokenizer="):
        probe(tiny(), "retrieval-heads")
    with pytest.raises(UnknownNameError, match="no option 'token'; did you mean tokens"):
        probe(tiny(), "echo-heads", token=3)
