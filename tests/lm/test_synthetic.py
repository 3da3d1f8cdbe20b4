"""Synthetic tasks: what an example looks like, and that its answers can be known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveate.errors import OptionError, UnknownNameError
from foveate.lm.synthetic import TASKS, lay_out_recall, make_examples, mqar, vocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "linear"


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("mqar-64-4", {"count": 16, "vocab": 8192, "length": 64, "pairs": 4, "seed": 11}),
        ("mqar-16-2-tiny-vocab", {"count": 64, "vocab": 20, "length": 16, "pairs": 2, "seed": 3}),
    ],
)
def test_the_random_stream_is_the_sources(case, options):
    golden = load_file(GOLDEN / f"zoology.{case}.safetensors")
    examples = mqar(**options, filler="zero")
    assert torch.equal(examples.inputs, golden["out.inputs"].long())
    assert torch.equal(examples.labels, golden["out.labels"].long())


def test_a_worked_example():
    made = lay_out_recall(torch.tensor([[2, 4]]), torch.tensor([[8, 7]]), torch.tensor([[4, 1]]), length=16)
    assert made.inputs.tolist() == [[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]]
    assert made.labels.tolist() == [[*[-100] * 6, 7, *[-100] * 5, 8, *[-100] * 3]]


@pytest.mark.parametrize("passes", [1, 3])
def test_every_key_is_asked_once_and_its_value_stood_before(passes):
    examples = mqar(20, vocab=64, length=32, pairs=4, passes=passes, filler="zero", seed=1)
    for tokens, labels in zip(examples.inputs.tolist(), examples.labels.tolist()):
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert len({tokens[i] for i in asked}) == 4
        context = tokens[: 8 * passes]
        known = dict(zip(context[::2], context[1::2]))
        assert all(labels[i] == known[tokens[i]] and i >= len(context) for i in asked)
        assert all(1 <= key < 32 <= value < 64 for key, value in known.items())
        assert context == context[:8] * passes


def test_queries_come_soon_after_the_pairs_more_often():
    labels = mqar(300, vocab=256, length=128, pairs=2, filler="zero").labels
    places = (labels != -100).nonzero()[:, 1]
    assert float((places < 4 + 20).double().mean()) > 0.5


def test_filler():
    plain = mqar(5, vocab=64, length=32, pairs=2, filler="zero", seed=2)
    filled = mqar(5, vocab=64, length=32, pairs=2, seed=2)
    other = mqar(5, vocab=64, length=32, pairs=2, seed=2, filler_seed=9)
    assert torch.equal(filled.labels, plain.labels)
    kept = plain.inputs != 0
    assert torch.equal(filled.inputs[kept], plain.inputs[kept])
    assert int((filled.inputs == 0).sum()) < int((plain.inputs == 0).sum()) / 4
    assert not torch.equal(filled.inputs, other.inputs)


def test_recall_asks_few_keys():
    examples = make_examples("recall", 30, vocab=64, length=20, pairs=4, queries=2, filler="zero")
    for tokens, labels in zip(examples.inputs.tolist(), examples.labels.tolist()):
        known = dict(zip(tokens[:8:2], tokens[1:8:2]))
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert len(asked) == 2
        assert all(i >= 8 and labels[i] == known[tokens[i]] for i in asked)


def test_forgetting_asks_for_the_last_value():
    examples = make_examples("forgetting", 30, vocab=64, length=40, pairs=4, updates=3, filler="zero")
    for tokens, labels in zip(examples.inputs.tolist(), examples.labels.tolist()):
        pairs = list(zip(tokens[:14:2], tokens[1:14:2]))
        # A dictionary keeps the last value of a key.
        known = dict(pairs)
        assert len(known) == 4
        assert len({value for _, value in pairs}) == 7
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert len(asked) == 4
        assert all(labels[i] == known[tokens[i]] for i in asked)


def test_circuits():
    parity = make_examples("parity", 20, length=9)
    assert bool((parity.inputs[:, -1] == 2).all())
    assert torch.equal(parity.labels[:, -1], parity.inputs[:, :-1].sum(1) % 2)
    assert bool((parity.labels[:, :-1] == -100).all())
    majority = make_examples("majority", 50, length=10)
    ones = majority.inputs[:, :-1].sum(1)
    assert torch.equal(majority.labels[:, -1], (ones >= 5).long())
    running = make_examples("cumulative-parity", 5, length=12)
    expected = [[sum(row[: i + 1]) % 2 for i in range(12)] for row in running.inputs.tolist()]
    assert running.labels.tolist() == expected


@pytest.mark.parametrize("task", TASKS)
def test_seeds_decide_and_tests_use_other_ones(task):
    options = {"length": 32}
    first, again = (make_examples(task, 8, seed=5, **options) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    for other in (make_examples(task, 8, seed=6, **options), make_examples(task, 8, seed=5, test=True, **options)):
        assert not torch.equal(first.inputs, other.inputs)
    assert int(first.inputs.max()) < vocabulary(task, **options)
    item = first[3]
    assert item["labels"] is item["shift_labels"] or torch.equal(item["labels"], item["shift_labels"])
    assert len(first) == 8


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("mqar", {"length": 63}, "length=63, allowed: even"),
        ("mqar", {"vocab": 64}, "vocab=64, allowed: more than length = 64"),
        ("mqar", {"pairs": 17}, "pairs=17, passes=1 need 68 tokens, allowed: at most length = 64"),
        ("mqar", {"pairs": 16, "passes": 2}, "need 96 tokens"),
        ("mqar", {"filler": "noise"}, "filler='noise', allowed: 'random', 'zero'"),
        ("mqar", {"power": 0.0}, "power=0.0, allowed: > 0"),
        ("recall", {"queries": 5}, "queries=5, allowed: 1 to pairs = 4"),
        ("forgetting", {"updates": 5}, "updates=5, allowed: 0 to pairs = 4"),
        ("parity", {"length": 1}, "length=1, allowed: >= 2"),
        ("mqar", {"pairs": 0}, "0 pairs of a vocabulary of 8192, allowed: 1 to"),
    ],
)
def test_bad_options(task, options, message):
    with pytest.raises(OptionError, match=message):
        make_examples(task, 3, **options)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="no synthetic task 'mqra'; did you mean mqar"):
        make_examples("mqra", 3)
    with pytest.raises(UnknownNameError, match="'mqar' has no option 'pair'; did you mean pairs"):
        make_examples("mqar", 3, pair=2)
    with pytest.raises(OptionError, match="seed=-1, allowed: 0 to"):
        make_examples("mqar", 3, seed=-1)
