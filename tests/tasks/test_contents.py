"""What the prompts say, read back from their tokens by other means than those that wrote it."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from foveate.errors import DataError, OptionError, ShapeError
from foveate.tasks.base import Example, Task, perplexity_from_nll
from foveate.tasks.haystack import depth_of, weave
from foveate.tasks.multi_turn import MultiTurn
from foveate.tasks.niah import Niah, NiahMultikey, NiahMultiquery, NiahMultivalue, NiahSingle
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.prompt import encode
from foveate.tasks.recall import Recall
from foveate.tasks.text import paragraphs
from foveate.tasks.variable_tracking import VariableTracking
from foveate.tasks.word_counts import CommonWords, FrequentWords
from foveate.tasks.words import ADJECTIVES, NOUNS, vocabulary
from tests.tasks.tokenizers import tokenizer

TOKENIZER = tokenizer("byte-level")
NEEDLE = re.compile(r"The secret number of ([\w-]+) is (\d{7})\.")


def made(task: Task, length: int = 1200, seed: int = 4) -> tuple[str, list[str], Example]:
    example = task.example(TOKENIZER, length, seed)
    return TOKENIZER.decode(example.context), [TOKENIZER.decode(turn.question) for turn in example.turns], example


@pytest.mark.parametrize("seed", range(6))
def test_the_pass_key_is_stated_at_its_depth(seed: int) -> None:
    context, questions, example = made(Passkey(), seed=seed)
    key = example.turns[0].answers[0]
    assert re.fullmatch(r"\d{5}", key)
    assert context.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
    assert context.index(key) / len(context) == pytest.approx(example.depth, abs=0.08)
    assert questions[0].endswith("The pass key is")
    assert example.meta["key"] == key


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_named_depth_is_kept(depth: float) -> None:
    for task in (Passkey(depth=depth), NiahSingle(depth=depth), Recall(depth=depth, queries=1)):
        context, _, example = made(task, 3000)
        assert example.depth == depth
        assert context.index(example.turns[0].answers[0]) / len(context) == pytest.approx(depth, abs=0.06)


@pytest.mark.parametrize(
    ("task", "keys", "values", "queries"),
    [
        (NiahSingle(), 1, 1, 1),
        (NiahMultikey(), 4, 1, 1),
        (NiahMultivalue(), 1, 4, 1),
        (NiahMultiquery(), 4, 1, 4),
        (Niah(keys=3, values=2, queries=2), 3, 2, 2),
    ],
)
def test_needles_in_prose(task: Niah, keys: int, values: int, queries: int) -> None:
    context, questions, example = made(task, 2000)
    needles: dict[str, list[str]] = {}
    for key, value in NEEDLE.findall(context):
        needles.setdefault(key, []).append(value)
    assert len(needles) == keys
    assert {len(each) for each in needles.values()} == {values}
    asked = [key for key in needles if key in re.split(r"\W+", questions[0])]
    assert len(asked) == queries
    assert sorted(example.turns[0].answers) == sorted(value for key in asked for value in needles[key])
    assert (example.depth is None) == (values * queries > 1)
    start, end = (
        "Secret numbers are hidden in the text below. Remember them.\n\n",
        "is",
    )
    assert context.startswith(start)
    assert questions[0].endswith(end)


def test_a_haystack_of_needles_holds_nothing_else_and_no_key_twice() -> None:
    context, _, example = made(NiahSingle(haystack="needles"), 3000)
    lines = NEEDLE.findall(context)
    assert len(lines) == example.meta["filler_units"] + 1 > 50
    assert len({key for key, _ in lines}) == len(lines)
    rest = NEEDLE.sub("", context).split("\n\n")[1]
    assert len(rest.split()) < 15


def test_uuid_needles() -> None:
    context, _, example = made(NiahSingle(haystack="needles", key="uuids", value="uuids"), 4000)
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    stated = dict(re.findall(f"The secret code of ({uuid}) is ({uuid})\\.", context))
    assert stated[example.meta["keys"][0]] == example.turns[0].answers[0]


def test_haystacks_of_different_seeds_begin_at_different_places() -> None:
    beginnings = {made(NiahSingle(depth=1.0), 600, seed)[0][:150] for seed in range(8)}
    assert len(beginnings) == 8


def test_multi_turn_asks_for_every_needle_once() -> None:
    context, questions, example = made(MultiTurn(questions=4), 2000)
    stated = dict(NEEDLE.findall(context))
    assert len(stated) == len(questions) == 4
    for question, turn in zip(questions, example.turns, strict=True):
        key = re.findall(r"The secret number of (\w+) is$", question)[0]
        assert turn.answers == (stated.pop(key),)
    assert example.depth is None
    assert len(example.meta["depths"]) == 4


def test_the_switch_of_multi_turn_changes_no_token_of_plain_prompts() -> None:
    shared, copies = MultiTurn(), MultiTurn(turns_share_cache=False)
    assert (shared.turns_share_cache, copies.turns_share_cache) == (True, False)
    assert made(shared)[2] == made(copies)[2]


def test_recall_holds_each_key_once() -> None:
    context, questions, example = made(Recall(queries=3), 2500)
    pairs = re.findall(r"^([\w-]+): (\d{4})$", context, re.MULTILINE)
    assert len({key for key, _ in pairs}) == len(pairs) == example.meta["filler_units"] + 3
    for question, turn in zip(questions, example.turns, strict=True):
        assert question.startswith("\n")
        assert turn.answers == (dict(pairs)[question[1:-1]],)
    assert not Recall().turns_share_cache


def test_recall_spreads_a_number_of_pairs_over_prose() -> None:
    context, _, example = made(Recall(pairs=6, queries=1), 2500)
    assert len(re.findall(r"^[\w-]+: \d{4}$", context, re.MULTILINE)) == 6
    assert example.depth == depth_of(4)


@pytest.mark.parametrize("task", [VariableTracking(), VariableTracking(chains=3, hops=2, worked_example=False)])
def test_variables_resolve_to_the_asked_value(task: VariableTracking) -> None:
    context, questions, example = made(task, 2500)
    value: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context):
        value[name] = source if source.isdigit() else value[source]
    asked = re.findall(r"have the value (\d{5}):$", questions[0])[0]
    assert {name for name in value if value[name] == asked} == set(example.turns[0].answers)
    assert len(value) == task.chains * (task.hops + 1)


def test_the_worked_example_of_variable_tracking_is_right() -> None:
    context, _, _ = made(VariableTracking(), 2500)
    solved, answer = re.split(r"Answer: 5 variables have the value \d{5}:", context)
    assert re.findall(r"\b[A-Z]{3}\b(?= =)", solved.replace("VAR ", "")) == answer.split("\n\n")[0].split()


def test_the_stricter_score_of_variable_tracking() -> None:
    _, _, example = made(VariableTracking(worked_example=False), 1000)
    names = " ".join(example.turns[0].answers)
    assert VariableTracking().score([names + " EXTRA"], example) == 1.0
    assert VariableTracking(scoring="iou").score([names + " EXTRA"], example) == pytest.approx(5 / 6)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (9000, 30, 3)])
def test_common_words_occur_as_often_as_said(length: int, often: int, seldom: int) -> None:
    context, questions, example = made(CommonWords(), length)
    listed = re.findall(r"(\d+)\. ([a-z]+)", context.split("\n\n")[-1])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    count = Counter(word for _, word in listed)
    assert set(example.turns[0].answers) == {word for word in count if count[word] == often}
    assert len(example.turns[0].answers) == 10
    rare = [count[word] for word in count if count[word] != often]
    assert max(rare) == seldom
    assert sum(each < seldom for each in rare) <= 1
    assert questions[0].endswith("The 10 words that occur most often are:")


def test_the_worked_example_of_common_words_is_right() -> None:
    context, _, _ = made(CommonWords(), 3000)
    _, solved, rest, *_ = context.split("\n\n")
    answer = [word for _, word in re.findall(r"(\d+)\. ([a-z]+)", rest)]
    count = Counter(re.findall(r"[a-z]+", solved))
    assert {word for word in count if count[word] == 3} == set(answer)
    assert len(answer) == 10


@pytest.mark.parametrize("length", [400, 2500])
def test_frequent_words_follow_zipf(length: int) -> None:
    context, _, example = made(FrequentWords(), length)
    count = Counter(context.split("\n\n")[1].split())
    dots = count.pop("...")
    count = Counter({word: times for word, times in count.items() if word.strip(".")})  # the last dots may be cut
    top = count.most_common(4)
    assert [word for word, _ in top[:3]] == sorted(example.turns[0].answers, key=lambda word: -count[word])
    assert top[2][1] > top[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word in count)
    # The shortest text has 74 words: the least n with n (1/16 - 1/25) / zeta(2) >= 1, zeta(2) = pi^2 / 6.
    words = 74 + example.meta["filler_units"]
    share = 6 / math.pi**2
    assert [times for _, times in top] == [int(words * share / rank**2) for rank in (2, 3, 4, 5)]
    assert dots >= int(words * share)  # more where they fill the gap


def test_perplexity_windows_roll_over_the_text_once(tmp_path: Path) -> None:
    text = "\n\n".join(paragraphs(None)[:50])
    (tmp_path / "text").write_text(text)
    task, stream = Perplexity(target=300, text=str(tmp_path / "text")), encode(TOKENIZER, text)
    first = task.example(TOKENIZER, 1000, 0)
    windows = first.meta["windows"]
    assert windows == (len(stream) - 1000) // 300 + 1
    read = list(first.context)
    for seed in range(3):
        example = task.example(TOKENIZER, 1000, seed)
        assert list(example.context) == read[-700:]
        assert example.turns == ()
        read += example.target
    assert read == stream[: 700 + 3 * 300]
    assert task.example(TOKENIZER, 1000, windows) == Example(
        first.context, (), 1000, windows, None, first.meta, first.target
    )
    assert task.measure == "perplexity"


def test_perplexity_of_a_text_that_is_too_short_names_its_size() -> None:
    most = len(encode(TOKENIZER, "\n\n".join(paragraphs(None))))
    with pytest.raises(OptionError, match=f"length={most + 1}, allowed: <= {most} tokens of this text; give text=PATH"):
        Perplexity().example(TOKENIZER, most + 1, 0)


def test_perplexity_from_nll() -> None:
    assert perplexity_from_nll(3 * math.log(7.0), 3) == pytest.approx(7.0)
    assert perplexity_from_nll(1e9, 1) == math.inf
    with pytest.raises(OptionError, match="count=0 tokens, allowed: >= 1"):
        perplexity_from_nll(1.0, 0)


def test_scores_are_the_mean_over_turns() -> None:
    task = MultiTurn(questions=2)
    _, _, example = made(task)
    right = [turn.answers[0] for turn in example.turns]
    assert task.score(right, example) == 1.0
    assert task.score([f"It is {right[0]}!", "no idea"], example) == 0.5
    assert task.score(["", ""], example) == 0.0
    for wrong in (["one"], "one"):
        with pytest.raises(ShapeError, match="for 2 turns; give a list with one output per turn"):
            task.score(wrong, example)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Niah(keys=2, queries=3), "queries=3, allowed: <= keys=2"),
        (lambda: Niah(keys=200, values=100), "keys * values = 20000, allowed: <= 10000"),
        (lambda: Recall(pairs=3), "queries=4, allowed: <= pairs=3"),
        (lambda: CommonWords(often=3), "often=3, allowed: > seldom=3"),
        (lambda: CommonWords(seldom=8), "often=6, allowed: > seldom=8"),
        (lambda: NiahSingle(haystack="hay"), "haystack='hay', allowed:"),
        (lambda: Passkey(depth=1.5), "depth=1.5, allowed:"),
        (lambda: MultiTurn(questions=0), "questions=0, allowed:"),
        (lambda: FrequentWords(alpha=1.0), "alpha=1.0, allowed:"),
    ],
)
def test_options_out_of_bounds_are_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("make", [NiahSingle, MultiTurn, Recall, Perplexity])
def test_a_missing_text_file_is_refused_at_once(make: type[Task]) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        make(text="gone.txt")  # type: ignore[call-arg]


def test_weave() -> None:
    units = ["a", "b", "c", "d"]
    assert weave(units, [(1.0, "Z"), (0.5, "Y"), (0.0, "X")]) == ["X", "a", "b", "Y", "c", "d", "Z"]
    assert weave([], [(0.9, "second"), (0.1, "first")]) == ["first", "second"]
    assert weave(units, []) == units


def test_few_seeds_cover_the_depths() -> None:
    for count in (5, 10, 20):
        depths = sorted([0.0, *(depth_of(seed) for seed in range(count)), 1.0])
        assert max(high - low for low, high in pairwise(depths)) < 2.7 / count


def test_word_lists() -> None:
    assert len(set(NOUNS)) == len(NOUNS)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    words = vocabulary()
    assert len(words) > 1000
    assert not any(one in other for one in words[::40] for other in words if one != other)
