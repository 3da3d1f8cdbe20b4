"""What the launchers launch compiles for Hopper to what was meant: no spills, tensor cores, asynchronous copies.

No GPU is needed. These are facts of the compiler, not times.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import configs
from tests.kernels.compiling import compiled

DECODES = {
    "decode dense 128k": (False, 17),
    "decode 4096 of 128k": (True, 12),
    "decode 1024 of 128k": (True, 10),
    "decode static cache": (False, 17),
}


@pytest.mark.parametrize("case", DECODES)
def test_decode_uses_tensor_cores_and_fills_a_multiprocessor(case):
    config = configs.DECODE[*DECODES[case], 128]
    split, merge = compiled(case)
    assert split["spills"] == 0
    assert split["mma"] > 0
    assert split["cp_async"] > 0
    # At least the 26 kB that the memory's latency asks for are in flight on each multiprocessor, twice over.
    assert split["shared"] * config.per_sm >= 2 * 26_000
    # The blocks that the table wants on a multiprocessor fit: 64 Ki registers, 227 KiB of shared memory.
    assert split["registers"] * split["num_warps"] * 32 * config.per_sm <= 65536
    assert split["shared"] * config.per_sm <= 227 * 1024
    assert merge["spills"] == 0


def test_a_dense_list_fills_the_device_once():
    split = compiled("decode dense 128k")[0]
    blocks = split["grid"][0] * split["grid"][1]
    wanted = 132 * configs.DECODE[False, 17, 128].per_sm
    assert wanted * 0.9 <= blocks <= wanted


@pytest.mark.parametrize("case, launches", [("topk float32", 3), ("topk bfloat16", 3), ("topk short", 1)])
def test_topk_launches_few_kernels_that_fit(case, launches):
    kernels = compiled(case)
    assert len(kernels) == launches
    for each in kernels:
        # The last pass keeps two words on the stack (Triton 3.6); more would be a spilled tile.
        assert each["stack"] <= 8
        # The two blocks per multiprocessor that the launcher asks for fit.
        assert each["registers"] * each["num_warps"] * 32 * 2 <= 65536


BLOCKS = ["blocks of 128", "blocks of 32k", "blocks of 64 and columns", "blocks and columns", "blocks D64"]


@pytest.mark.parametrize("case", BLOCKS)
def test_block_kernels_use_wgmma_and_spill_nothing(case):
    kernel = compiled(case)[-1]
    assert kernel["kernel"] == "block_flash_kernel"
    assert kernel["spills"] == 0
    assert kernel["wgmma"] > 0
    assert kernel["cp_async"] > 0
    assert kernel["shared"] <= 227 * 1024


def test_block_kernel_keeps_four_tiles_of_keys_and_values_in_flight():
    (kernel,) = compiled("blocks of 128")
    # Queries of 128 x 128 bfloat16 and four tiles of 64 keys and values.
    assert kernel["shared"] >= 128 * 128 * 2 + 4 * 2 * 64 * 128 * 2


@pytest.mark.parametrize("case", ["gradients", "gradients of 64", "gradients D64", "gradients D256"])
def test_gradient_kernels_use_tensor_cores_and_spill_next_to_nothing(case):
    _, queries, keys = compiled(case)
    for kernel in (queries, keys):
        assert kernel["wgmma"] + kernel["mma"] > 0
        assert kernel["cp_async"] > 0
        assert kernel["shared"] <= 227 * 1024
        # Addresses, 36 words at most: the fastest on an H200 all the same. A spilled tile would be thousands of bytes.
        assert kernel["stack"] <= 144


@pytest.mark.parametrize("case", ["reduction of 64 queries", "reduction of all queries"])
def test_reductions_use_tensor_cores_and_spill_nothing(case):
    for kernel in compiled(case):
        assert kernel["spills"] == 0
        assert kernel["wgmma"] > 0


@pytest.mark.parametrize("case", ["coding of tokens", "coding of channels"])
def test_coding_spills_nothing(case):
    for kernel in compiled(case):
        assert kernel["spills"] == 0


def test_descriptors_replace_the_copies_of_full_blocks():
    (plain,), (tma,) = compiled("blocks by pointers"), compiled("blocks by descriptors")
    assert tma["cp_async"] < plain["cp_async"]
    assert tma["spills"] == 0
