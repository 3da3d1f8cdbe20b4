"""Context and first question are exactly as long as asked, with any tokenizer, and the same every time."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import OptionError
from foveate.tasks.base import Example, Task
from foveate.tasks.word_counts import CommonWords
from tests.tasks.tokenizers import DRAFTED, EVERY, FAMILIES, tokenizer


def tokens(example: Example) -> int:
    asked = example.turns[0].question if example.turns else example.target
    return len(example.context) + len(asked)


def smallest(task: Task, family: str) -> int:
    """The smallest length, as the error for one token names it."""
    with pytest.raises(OptionError, match=r"length=1, allowed: >= \d+") as caught:
        task.example(tokenizer(family), 1, 0)
    found = re.search(r">= (\d+)", str(caught.value))
    assert found is not None
    return int(found[1])


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(EVERY)),
    family=st.sampled_from(FAMILIES),
    # The bundled text has about 800 tokens of the word-level tokenizer.
    more=st.integers(0, 650),
    seed=st.integers(0, 10**6),
)
def test_any_length_from_the_smallest_on_is_met_exactly(name: str, family: str, more: int, seed: int) -> None:
    task = EVERY[name]
    # Keys of another seed may take a few tokens more than those of seed 0.
    length = smallest(task, family) + 60 + more
    example = task.example(tokenizer(family), length, seed)
    assert tokens(example) == length == example.length
    assert example.seed == seed


@pytest.mark.parametrize("name", EVERY)
def test_the_named_smallest_length_is_the_smallest(name: str) -> None:
    task = EVERY[name]
    least = smallest(task, "byte-level")
    assert tokens(task.example(tokenizer("byte-level"), least, 0)) == least
    with pytest.raises(OptionError, match=f"length={least - 1}, allowed: >= {least}"):
        task.example(tokenizer("byte-level"), least - 1, 0)


@pytest.mark.parametrize("name", DRAFTED)
def test_chat_prompts_are_exact_too(name: str) -> None:
    task = dataclasses.replace(DRAFTED[name], chat=True)  # type: ignore[call-arg]
    length = smallest(task, "byte-level") + 137
    assert tokens(task.example(tokenizer("byte-level"), length, 0)) == length


@pytest.mark.parametrize("name", EVERY)
def test_equal_seeds_give_equal_examples_and_others_differ(name: str) -> None:
    task, length = EVERY[name], smallest(EVERY[name], "byte-level") + 200
    random.seed(1)
    first = task.example(tokenizer("byte-level"), length, 5)
    random.seed(2)
    drawn = random.random()
    random.seed(2)
    again = dataclasses.replace(task).example(tokenizer("byte-level"), length, 5)
    assert first == again
    assert random.random() == drawn  # the global generator was left alone
    assert task.example(tokenizer("byte-level"), length, 6).context != first.context


@pytest.mark.parametrize("name", EVERY)
def test_the_beginning_token_opens_the_context_and_counts(name: str) -> None:
    length = smallest(EVERY[name], "metaspace") + 50
    example = EVERY[name].example(tokenizer("metaspace"), length, 0)
    bos = tokenizer("metaspace").bos_token_id
    assert example.context[0] == bos
    assert bos not in example.context[1:]
    assert tokens(example) == length


@pytest.mark.parametrize("length", [0, -4, True, 12.5, "512"])
def test_a_length_that_is_no_whole_number_is_refused(length: object) -> None:
    for task in EVERY.values():
        with pytest.raises(OptionError, match="allowed: a whole number of tokens >= 1"):
            task.example(tokenizer("byte-level"), length, 0)  # type: ignore[arg-type]


def test_a_list_that_runs_out_of_rare_words_names_the_largest_length() -> None:
    task = CommonWords(words=1, often=2, seldom=1, worked_example=False)
    with pytest.raises(OptionError, match=r"length=60000, allowed: <= \d+") as caught:
        task.example(tokenizer("word-level"), 60000, 0)
    most = int(re.findall(r"<= (\d+)", str(caught.value))[0])
    assert tokens(task.example(tokenizer("word-level"), most, 0)) == most
    with pytest.raises(OptionError, match=f"allowed: <= {most}"):
        task.example(tokenizer("word-level"), most + 1, 0)
