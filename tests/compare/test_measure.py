"""The measuring loop against generate(), one long forward, and counting by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from foveate.compare.measure import Measured, Ways, _together, measure, warm_up
from foveate.compare.memory import quick_collections
from foveate.compare.subject import Figures, Subject, kept_shares, on
from foveate.errors import FoveateError
from foveate.tasks.base import Example, Turn


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_collections():
        yield


CONTEXT = tuple(range(10, 130))
QUESTIONS = ((5, 6, 7, 8), (20, 21, 22), (90, 91))


@dataclass(frozen=True)
class Echo:
    """A task whose score is the share of turns with any output, and that shows what came."""

    measure: str = "score"
    turns_share_cache: bool = True

    def score(self, outputs: Sequence[str], example: Example) -> float:
        return sum(bool(each) for each in outputs) / len(outputs)


class Ids:
    """A tokenizer whose text is the token ids themselves."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def example(turns: int = 1, new_tokens: int = 6) -> Example:
    asked = tuple(Turn(question, ("x",), new_tokens) for question in QUESTIONS[:turns])
    return Example(CONTEXT, asked, len(CONTEXT) + len(QUESTIONS[0]), 0, 0.5)


def run(model: Any, method: str, given: Example, task: Any = None, **ways: Any) -> Measured:
    subject = replace(Subject.of(model), eos=ways.pop("eos", frozenset()))
    with on(model, method) as applied:
        return measure(subject, applied, Ids(), task or Echo(), given, Ways(**ways))


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """By generate(), the outside opinion."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


def numbers(output: str) -> list[int]:
    return [int(each) for each in output.split()]


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("method", ["dense", "full"])
def test_answers_are_those_of_generate(model: Any, method: str, query_aware: bool) -> None:
    found = run(model, method, example(), query_aware=query_aware)
    assert numbers(found.outputs[0]) == greedy(model, CONTEXT + QUESTIONS[0], 6)
    assert found.score == 1.0
    assert found.prompt_tokens == len(CONTEXT) + len(QUESTIONS[0])


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("method", ["dense", "full"])
def test_turns_on_one_cache_keep_questions_and_answers(model: Any, method: str, query_aware: bool) -> None:
    found = run(model, method, example(turns=3), query_aware=query_aware)
    said: tuple[int, ...] = CONTEXT
    for question, output in zip(QUESTIONS, found.outputs):
        said += question
        expected = greedy(model, said, 6)
        assert numbers(output) == expected
        said += tuple(expected)


@pytest.mark.parametrize("query_aware", [True, False])
@pytest.mark.parametrize("method", ["dense", "full", "snapkv:budget=40,window=8"])
def test_turns_on_copies_do_not_see_each_other(model: Any, method: str, query_aware: bool) -> None:
    apart = run(model, method, example(turns=3), Echo(turns_share_cache=False), query_aware=query_aware)
    for place, question in enumerate(QUESTIONS):
        alone = replace(example(), turns=(Turn(question, ("x",), 6),))
        assert apart.outputs[place] == run(model, method, alone, query_aware=query_aware).outputs[0]


def test_an_answer_stops_at_its_end_and_leaves_it_out(model: Any) -> None:
    expected = greedy(model, CONTEXT + QUESTIONS[0], 6)
    stop = next(each for each in expected[1:] if each != expected[0])
    place = expected.index(stop)
    found = run(model, "dense", example(), eos=frozenset({stop}), min_decode_tokens=0)
    assert numbers(found.outputs[0]) == expected[:place]


def test_short_answers_are_timed_longer_but_not_scored_longer(model: Any) -> None:
    short = run(model, "dense", example(new_tokens=1), min_decode_tokens=0)
    assert short.decode_tokens_per_s is None
    longer = run(model, "dense", example(new_tokens=1), min_decode_tokens=5)
    assert longer.decode_tokens_per_s is not None
    assert longer.decode_tokens_per_s > 0
    assert longer.outputs == short.outputs
    assert longer.figures == short.figures


def likelihood(model: Any, ids: Sequence[int], count: int) -> float:
    """By one forward over everything, the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -count - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-count:]), reduction="sum"))


@pytest.mark.parametrize("stride", [1, 3, 100])
@pytest.mark.parametrize("method", ["dense", "full"])
def test_perplexity_is_the_likelihood_of_one_forward(model: Any, method: str, stride: int) -> None:
    target = tuple(range(200, 217))
    given = Example(CONTEXT, (), len(CONTEXT) + len(target), 0, target=target)
    found = run(model, method, given, Echo(measure="perplexity"), stride=stride)
    assert found.nll_sum == pytest.approx(likelihood(model, CONTEXT + target, len(target)), rel=1e-5)
    assert found.nll_count == len(target)
    assert found.score is None


def test_a_target_of_one_token_is_scored_by_the_prompt_alone(model: Any) -> None:
    given = Example(CONTEXT, (), len(CONTEXT) + 1, 0, target=(33,))
    found = run(model, "full", given, Echo(measure="perplexity"))
    assert found.nll_sum == pytest.approx(likelihood(model, (*CONTEXT, 33), 1), rel=1e-5)


def test_likelihoods_that_are_not_finite_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "logits", lambda self, ids, cache, last=1: torch.full((last, 260), torch.nan))
    given = Example(CONTEXT, (), len(CONTEXT) + 2, 0, target=(33, 34))
    with pytest.raises(FoveateError, match=r"not finite.*float32"):
        run(model, "dense", given, Echo(measure="perplexity"))


def test_the_stock_cache_is_counted_by_its_tensors(model: Any) -> None:
    figures = run(model, "dense", example(), min_decode_tokens=0).figures
    # Five of the six new tokens went through the cache: keys and values, 3 layers, 2 heads, width 16, float32.
    held = len(CONTEXT) + len(QUESTIONS[0]) + 5
    assert figures.cache_bytes == 2 * 3 * 2 * 16 * 4 * held
    assert figures.lengths == [[float(held)] * 2] * 3
    assert (figures.density, figures.prefill_density, figures.decode_density) == (1.0, 1.0, 1.0)
    assert figures.kept is None


def test_an_evicting_method_holds_less_and_says_where(model: Any) -> None:
    figures = run(model, "snapkv:budget=40,window=8", example(), min_decode_tokens=0).figures
    assert figures.lengths == [[45.0, 45.0]] * 3
    assert figures.tokens_seen == len(CONTEXT) + len(QUESTIONS[0]) + 5
    assert figures.kept is not None
    assert len(figures.kept) == 3
    assert all(len(heads) == 2 and all(len(bins) == 64 for bins in heads) for heads in figures.kept)
    # The window and what came after it stay; the bins before lost something.
    assert all(bins[-1] == 1.0 and min(bins) < 1.0 for heads in figures.kept for bins in heads)


COLD = "retrieval-attention:index=flat,sinks=2,window=8,budget=6,recall=1"


def test_host_bytes_and_recall_of_a_method_with_a_tier_and_an_index(model: Any) -> None:
    figures = run(model, COLD, example(), min_decode_tokens=0).figures
    # Of 129 tokens, sinks and window stay: keys and values, 3 layers, 2 heads, width 16, float32.
    cold = len(CONTEXT) + len(QUESTIONS[0]) + 5 - 2 - 8
    assert figures.host_bytes is not None
    assert 2 * 3 * 2 * 16 * 4 * cold <= figures.host_bytes < figures.cache_bytes
    # A flat index finds the best keys.
    assert figures.recall == 1.0
    unmeasured = run(model, COLD.replace("recall=1", "recall=0"), example(), min_decode_tokens=0).figures
    assert unmeasured.host_bytes is not None
    assert unmeasured.recall is None


@pytest.mark.parametrize("method", ["dense", "full", "snapkv:budget=40,window=8"])
def test_methods_without_a_tier_or_an_index_have_none(model: Any, method: str) -> None:
    figures = run(model, method, example(), min_decode_tokens=0).figures
    assert (figures.host_bytes, figures.recall) == (None, None)


def test_several_requests_have_the_mean_recall_and_the_largest_caches_bytes() -> None:
    def of(held: int, host: int | None, recall: float | None) -> Figures:
        return Figures(held, 1.0, 1.0, 1.0, [[1.0]], 1, host_bytes=host, recall=recall)

    both = _together([of(10, 4, 0.5), of(30, 9, None), of(20, 6, 1.0)])
    assert (both.cache_bytes, both.host_bytes, both.recall) == (30, 9, 0.75)
    assert _together([of(10, None, None)]).recall is None


class Held:
    def positions(self, layer: int, head: int) -> torch.Tensor:
        return torch.tensor([0, 1, 2, 50, 99])


def test_kept_shares_count_every_token_once() -> None:
    shares = torch.tensor(kept_shares(Held(), [[5.0]], 100)[0][0], dtype=torch.float64)
    edges = [100 * bin // 64 for bin in range(65)]
    counted = [sum(edges[bin] <= at < edges[bin + 1] for at in (0, 1, 2, 50, 99)) for bin in range(64)]
    expected = [count / (edges[bin + 1] - edges[bin]) for bin, count in enumerate(counted)]
    assert shares.tolist() == pytest.approx(expected, abs=1e-3)


def test_kept_shares_of_a_text_shorter_than_the_bins() -> None:
    shares = kept_shares(type("Few", (), {"positions": lambda *_: torch.tensor([1, 2])})(), [[2.0]], 3)
    assert shares == [[[0.0, 1.0, 1.0]]]


def test_times_and_peak_are_there(model: Any) -> None:
    found = run(model, "full", example())
    assert found.ttft_s is not None
    assert 0 < found.ttft_s < 60
    assert found.decode_tokens_per_s is not None
    assert found.decode_tokens_per_s > 0
    assert found.peak_bytes is not None
    assert found.peak_bytes >= 0


def test_a_warm_up_leaves_the_model_alone(model: Any) -> None:
    subject = Subject.of(model)
    with on(model, "snapkv:budget=40,window=8") as applied:
        warm_up(subject, applied, CONTEXT)
    assert model.config._attn_implementation == "sdpa"
    assert numbers(run(model, "dense", example()).outputs[0]) == greedy(model, CONTEXT + QUESTIONS[0], 6)


def test_the_ends_of_answers_come_from_model_and_tokenizer(model: Any) -> None:
    class Other:
        eos_token_id = 77

    assert Subject.of(model, Other()).eos == {2, 77}
    assert Subject.of(model).cache_keyword in ("past_key_values", "cache")


def test_a_stopwatch_waits_for_the_device_before_and_after(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Subject, "wait", lambda self: order.append("wait"))
    with Subject.of(model).timed() as watch:
        order.append("work")
        time.sleep(0.01)
    assert order == ["wait", "work", "wait"]
    assert 0.01 <= watch.seconds < 10
