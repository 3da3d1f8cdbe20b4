"""What the linear family launches compiles for Hopper to what was meant: tensor cores, copies ahead, few spills.

No GPU is needed. These are facts of the compiler, not times.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton.scan_configs import DELTA
from tests.kernels.compiling import compiled


def fits(kernel: dict) -> bool:
    return kernel["shared"] <= 227 * 1024 and kernel["registers"] * kernel["num_warps"] * 32 <= 65536


def test_many_heads_are_one_pass_whose_blocks_share_a_multiprocessor():
    (scan,) = compiled("none 96x8192", "scan_cases")
    assert scan["kernel"] == "scan_kernel"
    assert scan["grid"] == [2, 96, 1]
    assert scan["wgmma"] > 0
    assert scan["cp_async"] > 0
    assert 2 * scan["shared"] <= 227 * 1024
    assert 2 * scan["registers"] * scan["num_warps"] * 32 <= 65536
    # A handful of words outside the loop.
    assert scan["stack"] <= 64


def test_the_walk_of_the_delta_rule_holds_its_operands_in_registers():
    """Rows of S and M go into products from registers: shared memory is what is read ahead, and nothing is spilled."""
    *_, walk = compiled("scalar 96x8192 delta", "scan_cases")
    assert walk["kernel"] == "delta_kernel"
    assert walk["grid"] == [1, 96, 1]
    assert walk["spills"] == 0
    ahead = (3 * 64 * 128 + 128 * 64 + 64 * 64) * 2
    assert walk["shared"] <= DELTA[128].num_stages * ahead
    assert fits(walk)


def test_few_heads_are_split_to_one_wave():
    states, join, scan = compiled("fixed 8x65536", "scan_cases")
    assert [each["kernel"] for each in (states, join, scan)] == ["states_kernel", "join_kernel", "scan_kernel"]
    blocks = scan["grid"][0] * scan["grid"][1] * scan["grid"][2]
    assert 0.9 * 2 * 132 <= blocks <= 2 * 132
    assert states["spills"] == join["spills"] == 0
    assert all(fits(each) for each in (states, join, scan))


def test_delta_rule_prepares_walks_and_joins():
    kernels = compiled("scalar 8x65536 delta", "scan_cases")
    names = [each["kernel"] for each in kernels]
    assert names == ["cumulative_kernel", "prepare_kernel", "delta_kernel", "join_kernel", "delta_kernel"]
    prepare, walk = kernels[1], kernels[-1]
    # Three of them share a multiprocessor, for which a handful of words is spilled.
    assert 3 * prepare["registers"] * prepare["num_warps"] * 32 <= 65536
    assert prepare["stack"] <= 64
    assert prepare["wgmma"] > 0
    assert walk["wgmma"] > 0
    assert all(fits(each) for each in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scalar 16x8192 train", "scalar 16x8192 delta train"])
def test_gradients_use_tensor_cores_and_fit(case):
    kernels = compiled(case, "scan_cases")
    assert all(fits(each) for each in kernels)
    walks = [each for each in kernels if each["kernel"] in ("scan_kernel", "delta_kernel", "delta_back_kernel")]
    assert all(each["wgmma"] > 0 for each in walks)


def test_a_step_reads_the_state_once():
    (step,) = compiled("scalar 32x1 delta step", "scan_cases")
    assert step["spills"] == 0
    assert step["grid"][0] * step["grid"][1] >= 132
