"""What backend="auto" leaves to torch: calls of a kind that was not found correct on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention.backends.triton import scan
from tests.kernels.scans import inputs, make


def why(form: str, T: int, dtype: torch.dtype, *, k: int = 64, learned: bool = False, **options) -> str | None:
    tensors = {name: x if name in ("g", "beta") else x.to(dtype) for name, x in inputs(form, T, k=k, decay=0.1).items()}
    if learned:
        tensors["g"].requires_grad_()
    return scan.unchecked(make(tensors, **options))


@pytest.mark.parametrize("form", ["none", "fixed", "scalar", "vector"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_bfloat16_runs(form, T, normalize):
    assert why(form, T, torch.bfloat16, normalize=normalize) is None


def test_what_was_not_checked_says_so():
    assert "single steps in torch.float16" in why("none", 1, torch.float16)
    assert "normalisation in torch.float16" in why("none", 5, torch.float16, normalize=True)
    assert "scans in torch.float32" in why("none", 5, torch.float32)
    assert why("none", 5, torch.float16) is None
    assert "K = 256 > 128" in why("none", 5, torch.bfloat16, k=256, normalize=True)


def test_what_was_found_to_err_says_so():
    assert "K = 16 < 32" in why("scalar-delta", 5, torch.bfloat16, k=16)
    assert why("scalar-delta", 1, torch.bfloat16, k=16) is None
    assert "fixed decays" in why("fixed", 5, torch.bfloat16, learned=True, normalize=True)
    assert why("fixed", 5, torch.bfloat16, learned=True) is None
