"""linear_scan refuses bad input, saying what was given and what is allowed; and its choice of backend."""

from __future__ import annotations

import pytest
import torch

from foveate.attention.linear import explain_scan, kv_matmul_attention, linear_scan, linear_step
from foveate.errors import BackendError, OptionError, ShapeError, StateError

q, k = torch.randn(2, 1, 5, 2, 4).unbind()
v = torch.randn(1, 5, 4, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.randn(1, 5, 2, 5)}, ShapeError, r"K is 4 in q"),
        ({"v": torch.randn(1, 6, 4, 3)}, ShapeError, r"T is 5 in q"),
        ({"v": torch.randn(1, 5, 3, 3)}, ShapeError, r"v has 3 heads and q has 2: HV must be a multiple of H"),
        ({"v": v.double()}, ShapeError, "one floating dtype"),
        ({"q": q[:, :0], "k": k[:, :0], "v": v[:, :0]}, ShapeError, "T = 0, allowed: at least one token"),
        ({"g": torch.zeros(2)}, ShapeError, r"g \[2\] does not fit \[HV\]"),
        ({"g": torch.zeros(1, 5, 2)}, ShapeError, r"\[B, T, HV\]"),
        ({"g": torch.tensor([0.0, -1, 0.25, 0])}, OptionError, r"g has the value 0.25, allowed: <= 0"),
        ({"beta": torch.zeros(1, 5, 2)}, ShapeError, r"beta \[1, 5, 2\] does not fit"),
        ({"beta": torch.zeros(1, 5)}, ShapeError, r"it has 2 dimensions"),
        ({"beta": torch.zeros(1, 5, 4), "normalize": True}, OptionError, "normalize=True with beta"),
        ({"chunk_size": 48}, OptionError, "chunk_size=48, allowed: a power of two"),
        ({"chunk_size": 0}, OptionError, "chunk_size=0"),
        ({"initial_state": torch.zeros(1, 4, 3, 4)}, StateError, r"allowed: \[N, HV, K, V\] = \[1, 4, 4, 3\]"),
        ({"initial_state": torch.zeros(1, 4, 4, 3), "normalize": True}, StateError, r"V \+ 1\] = \[1, 4, 4, 4\]"),
        ({"initial_state": torch.zeros(1, 4, 4, 3).long()}, StateError, "of floats"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ShapeError, "from 0 to 4, allowed: from 0 to T = 5"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ShapeError, "from 1 to 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, ShapeError, "falls somewhere"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, ShapeError, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": torch.zeros(1, 4, 4, 3)}, StateError, r"\[2, 4"),
        ({"backend": "cuda"}, BackendError, r"backend='cuda', allowed: \('auto', 'reference'"),
        ({"backend": "triton"}, BackendError, r"q is on cpu; the Triton kernels need CUDA"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        linear_scan(**{"q": q, "k": k, "v": v, **change})


def test_packed_needs_one_row():
    with pytest.raises(ShapeError, match="B = 1, not B = 2"):
        linear_scan(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), cu_seqlens=torch.tensor([0, 5]))


def test_step_takes_one_token():
    with pytest.raises(ShapeError, match="allowed: one token; use linear_scan"):
        linear_step(q, k, v, None)


def test_explain_names_backend_and_reasons(monkeypatch):
    assert explain_scan(q, k, v).name == "torch"
    monkeypatch.setenv("FOVEATE_BACKEND", "reference")
    assert explain_scan(q, k, v, g=torch.zeros(4)).name == "reference"
    monkeypatch.setenv("FOVEATE_BACKEND", "flex")
    assert explain_scan(q, k, v).name == "torch"


def test_kv_matmul_refuses():
    qk, values = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 3)
    with pytest.raises(OptionError, match="normalizer='softmax', allowed"):
        kv_matmul_attention(qk, qk, values, normalizer="softmax")
    with pytest.raises(OptionError, match="rotated with normalizer='sum'"):
        kv_matmul_attention(qk, qk, values, normalizer="sum", rotated=(qk, qk))
    with pytest.raises(ShapeError, match=r"scale \[3\] does not fit \[H\]"):
        kv_matmul_attention(qk, qk, values, scale=torch.ones(3))
