"""Token mixers in one template (arXiv 2302.06218): Y = phi_out(P(X) X W_v) W_o with a matrix P per head.

P is read off a layer by giving it values that are 1 at one token and 0 elsewhere; what is known of P is then checked
for each kind of mixer. phi_out is nothing, or a norm and a gate.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.mixers.base import create_mixer
from foveate.mixers.linear.transnormer import normed
from foveate.mixers.parts import ShortConvolution

N, DIM, HEADS = 10, 16, 2


def made(spec: str, **options):
    torch.manual_seed(0)
    mixer = create_mixer(spec, **{"dim": DIM, "heads": HEADS, **options}).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def tokens(length: int = N, seed: int = 1) -> Tensor:
    return torch.randn(1, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def mixed(mixer, x: Tensor, values: Tensor | None = None) -> Tensor:
    """P V per head, [H, N, D], of the layer's own values, or of values [N] that are alike in all channels."""
    seen: list[Tensor] = []
    after = mixer.o_norm if hasattr(mixer, "o_norm") else mixer.o_proj
    hooks = [after.register_forward_pre_hook(lambda module, given: seen.append(given[0]))]
    if values is not None:
        hooks.append(mixer.v_proj.register_forward_hook(lambda module, given, out: values[:, None].expand_as(out)))
    mixer(x)
    for hook in hooks:
        hook.remove()
    return seen[0][0].reshape(x.shape[1], mixer.heads, -1).transpose(0, 1)


def matrix(mixer, x: Tensor) -> Tensor:
    """P [H, N, N], and the check that every channel of a head is mixed by it."""
    columns = [mixed(mixer, x, each) for each in torch.eye(x.shape[1], dtype=x.dtype)]
    assert all(torch.allclose(each, each[..., :1].expand_as(each), atol=1e-12) for each in columns)
    return torch.stack([each[..., 0] for each in columns], -1)


AVERAGES = ["softmax", "softmax:window=3", "linear", "based", "aaren", "transnormer-diag:block=4,weights=softmax"]
SIGNED = ["linear:normalize=false", "retnet", "gla", "normalised-attention", "transnormer-diag:block=4,weights=softmax"]
BOTH_WAYS = [
    "softmax:causal=false,rotary=false",
    "linear:causal=false",
    "transnormer-diag:block=64,weights=softmax,causal=false",
]


@pytest.mark.parametrize("spec", dict.fromkeys([*AVERAGES, *SIGNED, *BOTH_WAYS]))
def test_the_layer_is_its_matrix_on_its_values(spec):
    mixer, x = made(spec), tokens()
    v = mixer.v_proj(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)
    assert torch.allclose(mixed(mixer, x), matrix(mixer, x) @ v, atol=1e-9)


@pytest.mark.parametrize("spec", dict.fromkeys([*AVERAGES, *SIGNED]))
def test_causal_matrices_are_lower_triangular_and_depend_on_the_data(spec):
    mixer = made(spec)
    P = matrix(mixer, tokens())
    assert torch.allclose(P, P.tril(), atol=1e-12)
    assert not torch.allclose(P, matrix(mixer, tokens(seed=2)), atol=1e-3)


@pytest.mark.parametrize("spec", [*AVERAGES, *BOTH_WAYS])
def test_rows_of_attention_are_averages(spec):
    P = matrix(made(spec), tokens())
    assert bool((P >= -1e-12).all())
    assert torch.allclose(P.sum(-1), torch.ones_like(P[..., 0]), atol=1e-5)


def test_sparse_attention_is_a_band_or_a_block_diagonal():
    at = torch.arange(N)
    apart = at[:, None] - at
    band = matrix(made("softmax:window=3"), tokens()) > 0
    assert torch.equal(band[0], (apart >= 0) & (apart <= 3))
    blocks = matrix(made("transnormer-diag:block=4,weights=softmax"), tokens()) > 0
    assert torch.equal(blocks[0], (apart >= 0) & (at[:, None] // 4 == at // 4))


def test_a_fixed_query_gives_rows_in_one_proportion():
    P = matrix(made("aaren"), tokens())
    last = P[:, -1:].expand_as(P).tril()
    assert torch.allclose(P, last / last.sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "rank"),
    [
        ("linear:normalize=false", 2),
        ("linear", 2),
        ("retnet", 2),
        ("gla", 1),
        ("normalised-attention", 2),
        ("aaren", 1),
    ],
)
def test_linear_recurrences_are_semiseparable_of_the_rank_of_their_state(spec, rank):
    # Everything that tokens from i on know of earlier ones went through the state, which has K channels per head.
    mixer = made(spec, heads=8)
    P = matrix(mixer, tokens(16))
    assert max(int(torch.linalg.matrix_rank(P[h, i:, :i], rtol=1e-9)) for h in range(8) for i in range(1, 16)) == rank


def test_softmax_attention_fits_no_small_state():
    P = matrix(made("softmax", heads=8), tokens(16))
    assert int(torch.linalg.matrix_rank(P[0, 8:, :8], rtol=1e-9)) > 4


def test_a_convolution_is_one_toeplitz_matrix_for_all_data():
    conv = ShortConvolution(1, 4, activation=None).double()
    start = torch.zeros(1, 3, 1, dtype=torch.float64)
    P = torch.stack([conv(each[None, :, None], start)[0][0, :, 0] for each in torch.eye(N).double()], -1)
    taps = conv.weight[0, 0].flip(0)
    apart = torch.arange(N)[:, None] - torch.arange(N)
    within = (apart >= 0) & (apart < 4)
    assert torch.allclose(P, torch.where(within, taps[apart.clamp(0, 3)], 0), atol=1e-12)
    x = torch.randn(N, dtype=torch.float64)
    assert torch.allclose(conv(x[None, :, None], start)[0][0, :, 0], P @ x, atol=1e-12)


@pytest.mark.parametrize("spec", [*BOTH_WAYS, "transnormer-norm:lrpe=false,causal=false"])
def test_without_positions_and_order_a_permutation_goes_through(spec):
    mixer, x = made(spec), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(mixer(x[:, order])[0], mixer(x)[0][:, order], atol=1e-10)


@pytest.mark.parametrize("spec", ["softmax", "retnet", "transnormer-norm:causal=false", "lightning", "rat"])
def test_with_positions_or_order_it_does_not(spec):
    mixer, x = made(spec), tokens()
    order = torch.arange(N).flip(0)
    assert not torch.allclose(mixer(x[:, order])[0], mixer(x)[0][:, order], atol=1e-4)


def test_what_follows_the_matrix_is_a_norm_and_a_gate():
    x = tokens()
    norm = made("transnormer-norm")
    q, k, v = (p(x)[0].unflatten(-1, (HEADS, -1)) for p in (norm.q_proj, norm.k_proj, norm.v_proj))
    at = torch.arange(N)[None]
    q, k = (norm.lrpe(torch.nn.functional.elu(each)[None], at)[0] for each in (q, k))
    o = (torch.einsum("ihd,jhd->hij", q, k).tril() @ v.transpose(0, 1)).transpose(0, 1).flatten(1)
    assert torch.allclose(norm(x)[0][0], norm.o_proj(normed(o)), atol=1e-9)
    gated = made("gla")
    o = (matrix(gated, x) @ gated.v_proj(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)).transpose(0, 1)
    gate = gated.g_proj(x)[0].unflatten(-1, (HEADS, -1))
    assert torch.allclose(gated(x)[0][0], gated.o_proj(gated.o_norm(o, gate).flatten(1)), atol=1e-9)


def test_states_grow_with_the_text_only_where_keys_are_kept():
    def grown(spec: str) -> int:
        mixer = made(spec)
        return mixer.state_bytes(1, 2000) - mixer.state_bytes(1, 1000)

    per_token = 2 * DIM * 8
    assert grown("softmax") == 1000 * per_token
    assert grown("rat:chunk=20") == 50 * per_token
    for spec in ("linear", "aaren", "gla", "normalised-attention", "transnormer-diag:block=4", "softmax:window=3"):
        assert grown(spec) == 0
