"""The nearest of earlier queries, head by head, and the similarity of all heads together."""

from __future__ import annotations

import pytest
import torch

from foveate.methods.select.reuse import NEVER, NearestQuery, WhenDissimilar


def test_the_nearest_query_of_each_head_that_may_serve() -> None:
    torch.manual_seed(0)
    query, held = torch.randn(2, 3, 8), torch.randn(2, 6, 3, 8)
    at = torch.tensor([[5, 3, 9, 1, 4, 7], [2, 8, 0, 6, 3, 1]])[..., None]
    fits = torch.rand(2, 6, 3) < 0.6
    fits[0, :, 1] = False
    position, near = NearestQuery(0.3).match(query, held, at, fits)
    for b in range(2):
        for h in range(3):
            distances = {
                int(at[b, i]): float((query[b, h] - held[b, i, h]).square().sum()) for i in range(6) if fits[b, i, h]
            }
            if not distances:
                assert (int(position[b, h]), bool(near[b, h])) == (NEVER, False)
                continue
            best = min(distances, key=lambda each: distances[each])
            assert int(position[b, h]) == best
            assert bool(near[b, h]) == (distances[best] < 2 * 8 * 0.7**2)


def test_ties_go_to_the_lowest_position() -> None:
    query = torch.ones(1, 1, 4)
    held = torch.ones(1, 3, 1, 4)
    at = torch.tensor([[7, 2, 5]])[..., None]
    assert NearestQuery(0.5).match(query, held, at, at >= 0)[0].tolist() == [[2]]
    assert NearestQuery(0.5).match(query, held, at, at > 2)[0].tolist() == [[5]]


@pytest.mark.parametrize(("threshold", "due"), [(1.0, [True, True]), (0.5, [False, True]), (-9.0, [False, False])])
def test_as_a_policy_any_far_head_starts_anew(threshold: float, due: list[bool]) -> None:
    reference = torch.zeros(2, 3, 4)
    query = reference.clone()
    query[1, 2] = 3.0
    assert NearestQuery(threshold).due(7, query, reference).tolist() == due


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cosine_of_all_heads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 4, 8).to(dtype)
    reference = torch.stack((query[0], query[1] + torch.randn(4, 8).to(dtype) / 2, torch.zeros(4, 8, dtype=dtype)))
    cosines = torch.nn.functional.cosine_similarity(query.double().flatten(1), reference.double().flatten(1), dim=-1)
    assert cosines[1] < 0.999
    for threshold in (-1.0, 0.5, float(cosines[1]) - 1e-3, float(cosines[1]) + 1e-3, 1.1):
        found = WhenDissimilar(threshold, flat=True).due(1, query, reference)
        assert found.tolist() == (cosines.clamp(-1, 1) < threshold).tolist()
    assert WhenDissimilar(1.1, interval=2, flat=True).due(1, query, reference).tolist() == [False] * 3
