"""Every golden vector that is copied here, through its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.adapters import ADAPTERS

HERE = Path(__file__).parent
CASES = [
    (manifest.parent, case)
    for manifest in sorted(HERE.glob("*/manifest.json"))
    for case in json.loads(manifest.read_text())
]
# Tensors of the manifest that are notes on a computation, not an output of the system.
EXACT = (torch.uint8, torch.int32, torch.int64, torch.bool)


@pytest.mark.parametrize(("folder", "case"), CASES, ids=[case["case"] for _, case in CASES])
def test_golden(folder: Path, case: dict[str, Any]) -> None:
    tensors = load_file(folder / f"{case['case']}.safetensors")
    if "params_file" in case:
        tensors |= {f"param.{name}": tensor for name, tensor in load_file(folder / case["params_file"]).items()}
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith("out.")}
    made = ADAPTERS[f"{case['system']}/{case['function']}"](case["config"], given)
    expected = {name: tensor for name, tensor in tensors.items() if name.startswith("out.")}
    compared = 0
    for name in expected.keys() & made.keys():
        want, got = expected[name], made[name]
        assert got.shape == want.shape, name
        compared += 1
        if want.dtype in EXACT:
            assert torch.equal(got.to(want.dtype), want), name
        elif want.numel():
            finite = torch.isfinite(want)
            assert torch.equal(torch.isfinite(got), finite), name
            error = (got[finite].double() - want[finite].double()).norm() / want[finite].double().norm().clamp_min(
                1e-12
            )
            assert error <= max(case["rtol"], 2e-6), f"{name}: {error:.2e}"
    assert compared, f"the adapter returned none of {sorted(expected)}"


def test_every_case_has_an_adapter() -> None:
    cases = {f"{case['system']}/{case['function']}" for _, case in CASES}
    assert cases <= set(ADAPTERS), sorted(cases - set(ADAPTERS))
    assert len(CASES) > 50
