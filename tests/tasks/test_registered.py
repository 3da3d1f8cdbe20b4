"""Every task is made by name, and its card shows its options."""

from __future__ import annotations

import pytest

from foveate.errors import OptionError, UnknownNameError
from foveate.registry import card, create, names
from tests.tasks.tokenizers import tokenizer

NAMES = {
    "passkey",
    "niah",
    "niah-single",
    "niah-multikey",
    "niah-multivalue",
    "niah-multiquery",
    "multi-turn",
    "recall",
    "variable-tracking",
    "common-words",
    "frequent-words",
    "perplexity",
    "data-file",
}


def test_names() -> None:
    assert set(names(kind="task")) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"data-file"}))
def test_tasks_need_no_options(name: str) -> None:
    example = create(name).example(tokenizer("word-level"), 3000, 0)
    assert example.length == 3000
    assert all(each.help for each in card(name).options)


def test_options_in_a_spec() -> None:
    task = create("multi-turn:turns_share_cache=false,questions=2")
    assert not task.turns_share_cache
    assert len(task.example(tokenizer("word-level"), 500, 0).turns) == 2
    with pytest.raises(UnknownNameError, match="passkey has no option 'digit'; did you mean digits"):
        create("passkey:digit=4")
    with pytest.raises(OptionError, match="digits=0, allowed:"):
        create("passkey:digits=0")
