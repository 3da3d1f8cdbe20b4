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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_found_correct_runs(form, T, normalize, dtype):
    assert why(form, T, dtype, normalize=normalize) is None


def test_what_was_not_checked_says_so():
    assert "K = 256 > 128" in why("none", 5, torch.bfloat16, k=256, normalize=True)
    assert why("none", 5, torch.float32, k=256) is None


def test_what_was_found_to_err_says_so():
    assert "K = 16 < 32" in why("scalar-delta", 5, torch.bfloat16, k=16)
    assert why("scalar-delta", 5, torch.float32, k=16) is None
    assert why("scalar-delta", 1, torch.bfloat16, k=16) is None
    for given in ({"form": "fixed", "normalize": True}, {"form": "scalar-delta"}):
        assert "gradients of decays" in why(**given, T=5, dtype=torch.bfloat16, k=48, learned=True)
        assert why(**given, T=5, dtype=torch.bfloat16, k=64, learned=True) is None
        assert why(**given, T=5, dtype=torch.float32, k=48, learned=True) is None
        assert why(**given, T=5, dtype=torch.bfloat16, k=48) is None
    assert why("fixed", 5, torch.bfloat16, k=48, learned=True) is None
