"""Probes of heads on hand-built attention, whose scores are known."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from foveate import registry
from foveate.errors import DataError, OptionError, UnknownNameError
from foveate.hf.subject import ModelSubject
from foveate.methods.cache import LayerCache
from foveate.methods.profile import ModelIdentity
from foveate.methods.step import Step
from foveate.probes.base import HeadTable, Hear
from foveate.probes.echo_heads import EchoHeads, echo_scores, sample_queries
from foveate.probes.retrieval_heads import (
    NEEDLES,
    Needle,
    RetrievalHeads,
    make_trial,
    retrieval_hits,
    semantic_hits,
    word_recall,
)
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer

IDENTITY = ModelIdentity("toy", 2, 4, 2, 512, "none")
TEXT = ("The gate is open. A cat sleeps under the table.", "Rain falls on the roof. The river runs to the sea.")


def pointing(targets: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """q [1, Hq, M, N], k [1, 1, N, N] with which query i of head h attends to key targets[h, i] alone."""
    return 1000.0 * torch.nn.functional.one_hot(targets, N).float()[None], torch.eye(N)[None, None]


def test_echo_and_induction_of_pointing_heads() -> None:
    K, N = 5, 20
    at = torch.arange(K, N)
    targets = torch.stack((at - K, at - K + 1, at - 2 * K, at, at - 1)).clamp_min(0)
    q, k = pointing(targets, N)
    echo, induction = echo_scores(q, k, at, K, scale=1.0)
    assert echo[0].tolist() == pytest.approx([1, 0, 11 / 15, 0, 0])
    assert induction[0].tolist() == pytest.approx([0, 1, 0, 0, 0])


def test_echo_scores_equal_sums_over_the_full_weights() -> None:
    K, N = 6, 24
    q, k = torch.randn(1, 4, N, 8), torch.randn(1, 2, N, 8)
    at = sample_queries(K, 4, 7)
    assert at.numel() == 7
    assert at.min() >= K
    assert at.max() == N - 1
    echo, induction = echo_scores(q[:, :, at], k, at, K, scale=0.3)
    for h in range(4):
        sums = [0.0, 0.0]
        for t in at.tolist():
            A = (k[0, h // 2, : t + 1] @ q[0, h, t] * 0.3).softmax(0)
            sums[0] += sum(float(A[t - m * K]) for m in range(1, t // K + 1))
            sums[1] += sum(float(A[t - m * K + 1]) for m in range(1, t // K + 1))
        assert float(echo[0, h]) == pytest.approx(sums[0] / 7, abs=1e-5)
        assert float(induction[0, h]) == pytest.approx(sums[1] / 7, abs=1e-5)


def test_echo_probe_on_a_model_avoids_special_tokens_and_leaves_it_as_it_was() -> None:
    model = tiny("llama").train()
    probe = EchoHeads(tokens=8, repeats=3)
    ids = probe.prompt(128, [0, 1, 2])
    assert ids.shape == (1, 24)
    assert ids.min() >= 3
    assert torch.equal(ids[0, :8], ids[0, 16:])
    table = probe.measure(ModelSubject(model), ToyTokenizer())
    assert table.scores("induction").shape == (3, 4)
    assert bool(((table.scores("echo") >= 0) & (table.scores("echo") <= 1)).all())
    assert model.training
    assert model.config._attn_implementation != "foveate"


def test_layers_with_a_window_of_their_own_stay_unmeasured() -> None:
    table = EchoHeads(tokens=8, repeats=2).measure(ModelSubject(tiny("gemma3_text")))
    assert table.scores().isnan().all(1).tolist() == [True, False, True]
    assert {layer for layer, _, _ in table.top(99)} == {1}


class Actor:
    """A subject that recites the needle's answer, with heads that attend as they are told.

    Layer 0: head 0 points at the answer token that is emitted next, head 1 at the first token, head 2 at the answer
    token before the emitted one, head 3 everywhere. Layer 1: heads 0 and 1 as in layer 0, half of the time.
    """

    identity = IDENTITY
    vocabulary = 512

    def __init__(self, trial_of: dict[tuple[int, ...], tuple[int, int]], wrong: bool = False) -> None:
        self.trial_of, self.wrong = trial_of, wrong

    @contextlib.contextmanager
    def session(self, hear: Hear) -> Iterator[Actor]:
        self.hear = hear
        yield self

    def start(self) -> None:
        self.fed: list[int] = []

    def feed(self, ids: Tensor) -> Tensor:
        before = len(self.fed)
        self.fed += ids[0].tolist()
        prompt = next((each for each in self.trial_of if list(each) == self.fed[: len(each)]), None)
        logits = torch.zeros(1, self.vocabulary)
        if prompt is None:
            return logits
        start, end = self.trial_of[prompt]
        said = len(self.fed) - len(prompt)
        now = start + said
        token = prompt[now] if now < end else ToyTokenizer.eos_token_id
        logits[0, 7 if self.wrong else token] = 1.0
        N = len(self.fed)
        for layer in range(2):
            aim = now if now < end else 0
            targets = torch.tensor([aim, 0, max(start, aim - 1), 0])
            if layer and said % 2:
                targets[:] = 0
            q, k = pointing(targets[:, None], N)
            q[0, 3] = 0.0
            cache = LayerCache()
            cache.append(k, k)
            self.hear(Step(layer=layer, layers=2, phase="decode" if before else "prefill", q=q, cache=cache, scale=1.0))
        return logits


def acted(wrong: bool = False) -> tuple[Actor, ToyTokenizer, RetrievalHeads]:
    tokenizer = ToyTokenizer(512)
    probe = RetrievalHeads(min_length=128, max_length=160, lengths=2, depths=3, needles=2)
    trials = list(probe.trials(tokenizer, TEXT))
    assert len(trials) == probe.count
    return Actor({tuple(t.ids[0].tolist()): (t.start, t.end) for t in trials}, wrong), tokenizer, probe


def test_a_head_that_copies_scores_one() -> None:
    actor, tokenizer, probe = acted()
    table = probe.measure(actor, tokenizer, TEXT)
    retrieval, semantic = table.scores(), table.scores("semantic")
    assert float(retrieval[0, 0]) == pytest.approx(1.0)
    assert retrieval[0, 1] == 0
    # It points into the needle, but at another token than the one that comes (but for the first step).
    assert float(retrieval[0, 2]) == pytest.approx(1 / 9, abs=0.02)
    assert 0.4 < retrieval[1, 0] < 0.6
    # Its whole mass is in the needle at each of the 9 or 10 answer steps, whichever token it points at.
    assert float(semantic[0, 0]) >= 9
    assert float(semantic[0, 2]) == pytest.approx(float(semantic[0, 0]))
    assert 0 < semantic[0, 3] < 2
    assert semantic[0, 1] == 0
    assert table.facts == {"trials": 12, "counted": 12}
    assert table.top(1)[0][:2] == (0, 0)


def test_failed_trials_do_not_count_and_none_left_is_an_error() -> None:
    actor, tokenizer, probe = acted(wrong=True)
    with pytest.raises(DataError, match="answered none of the 12 needle questions"):
        probe.measure(actor, tokenizer, TEXT)


def test_hits_by_definition() -> None:
    ids = torch.tensor([9, 5, 6, 5, 8])
    assert retrieval_hits(torch.tensor([1, 3, 2, 0, 40]), ids, 1, 4, 5).tolist() == pytest.approx(
        [1 / 3, 1 / 3, 0, 0, 0]
    )
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.3]])
    assert semantic_hits(rows, ids, 1, 4, 5).item() == pytest.approx(2 * 0.6)
    assert semantic_hits(rows, ids, 1, 4, 9).item() == 0


def test_a_trial_has_its_length_and_its_needle_at_a_sentence_end() -> None:
    tokenizer = ToyTokenizer()
    for needle in NEEDLES:
        for depth in (0.0, 0.4, 1.0):
            trial = make_trial(tokenizer, TEXT, needle, 150, depth)
            ids = trial.ids[0].tolist()
            assert len(ids) == 150
            assert ids[trial.start : trial.end] == tokenizer(needle.answer)["input_ids"]
            first = trial.start - len(tokenizer(needle.before)["input_ids"])
            assert depth == 1.0 or first == 1 or ids[first - 1] == tokenizer(".")["input_ids"][0]
    with pytest.raises(DataError, match="no room"):
        make_trial(tokenizer, TEXT, NEEDLES[0], 30, 0.5)


def test_word_recall() -> None:
    assert word_recall("drink hot chocolate", "You DRINK chocolate!") == pytest.approx(2 / 3)
    assert word_recall("a a b", "a") == pytest.approx(1 / 3)
    assert word_recall("a", "") == 0


def test_a_table_says_itself_and_becomes_a_profile() -> None:
    table = HeadTable("x", IDENTITY, {"a": torch.tensor([[0.1, torch.nan], [0.3, 0.3]])}, {"trials": 1})
    assert [head[:2] for head in table.top(9)] == [(1, 0), (1, 1), (0, 0)]
    assert "1-0 0.300" in str(table)
    assert json.loads(json.dumps(table.as_dict()))["tables"]["a"][0][1] is None
    assert table.profile().kind == "x"
    with pytest.raises(UnknownNameError, match="no table 'b'"):
        table.scores("b")


def test_bad_options() -> None:
    assert {"echo-heads", "retrieval-heads"} <= set(registry.names(kind="probe"))
    with pytest.raises(OptionError, match="repeats=1, allowed: >= 2"):
        EchoHeads(repeats=1)
    with pytest.raises(OptionError, match="max_length=100, allowed: >= min_length=256"):
        RetrievalHeads(max_length=100)
    with pytest.raises(OptionError, match="chat=True, allowed: False"):
        list(RetrievalHeads(chat=True).trials(ToyTokenizer(), TEXT))
    with pytest.raises(DataError, match="tokenizer and filler"):
        RetrievalHeads().measure(ModelSubject(tiny()))


def test_own_needle() -> None:
    needle = Needle("The key is", "red", "What is the key?")
    assert make_trial(ToyTokenizer(), TEXT, needle, 100, 0.5).needle is needle
