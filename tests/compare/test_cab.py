"""The compositional index and the efficiency length."""

from __future__ import annotations

import pytest

from foveate.compare.cab import METRICS, compositional_index, efficiency_length
from foveate.errors import OptionError, ShapeError
from foveate.mixers.base import PATTERNS


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_average_values_score_zero_and_a_better_deviation_scores_one(pattern):
    means = [each.mean for each in METRICS[pattern]]
    assert compositional_index(pattern, means).total == pytest.approx(0, abs=1e-12)
    better = [each.mean + each.sign * each.deviation for each in METRICS[pattern]]
    found = compositional_index(pattern, better)
    assert found.total == pytest.approx(1)
    assert set(found.tasks) == {each.task for each in METRICS[pattern]}


def test_tasks_weigh_alike_however_many_metrics_they_have():
    values = [each.mean for each in METRICS["causal-self"]]
    language = METRICS["causal-self"][-1]
    values[-1] = language.mean - 3 * language.deviation
    found = compositional_index("causal-self", values)
    assert found.tasks == {"speech": pytest.approx(0), "summaries": pytest.approx(0), "lm": pytest.approx(3)}
    assert found.total == pytest.approx(1)


def test_efficiency_length_is_where_the_curves_cross():
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    dense = [1e-9 * n * n + 2e-7 * n + 1e-3 for n in lengths]
    efficient = [2.2e-6 * n + 1e-3 for n in lengths]
    assert efficiency_length(lengths, dense, efficient) == pytest.approx(2000, rel=1e-6)
    # Always cheaper, and never.
    assert efficiency_length(lengths, dense, [1e-7 * n for n in lengths]) == 0
    assert efficiency_length(lengths, [1e-6 * n - 1e-12 * n * n for n in lengths], efficient) is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="pattern='self', allowed: "):
        compositional_index("self", [])
    with pytest.raises(ShapeError, match="allowed: 6 finite values, of"):
        compositional_index("causal-self", [1.0] * 5)
    with pytest.raises(ShapeError, match="finite"):
        compositional_index("causal-self", [float("nan")] * 6)
    with pytest.raises(ShapeError, match="2 lengths, 2 and 2 costs"):
        efficiency_length([1, 2], [1.0, 2.0], [1.0, 2.0])
