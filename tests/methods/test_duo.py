"""DuoAttention: gates, the two-way mix, and decoding against a mask built from sinks, window and chunks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError, ProfileError, ShapeError
from foveate.hf import apply
from foveate.methods import SingleLayer, create
from foveate.methods.budgets import lowest_stream, sparsify_heads
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.duo import Duo, gated_mix, streaming_attention, streaming_plan
from foveate.methods.profile import ModelIdentity, Profile
from tests.models import tiny

IDENTITY = ModelIdentity("toy", 1, 4, 2, 8, "none")
GATES = torch.tensor([[0.9, 0.1]])


def bound(**options: object) -> Duo:
    return Duo(profile=table_profile("duo", IDENTITY, alpha=GATES), **options).for_model(IDENTITY)  # type: ignore[arg-type]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention under a mask [B, Hkv, N, N], the slow way."""
    k, v, mask = (each.repeat_interleave(2, 1) for each in (k, v, mask))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def deployed_mask(chunks: list[int], sinks: int, window: int) -> Tensor:
    """[2, N, N]: head 0 is full; head 1 keeps sinks and window at every boundary, after a full first chunk."""
    N = sum(chunks)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    stream = causal.clone()
    start = chunks[0]
    for M in chunks[1:]:
        for i in range(start, start + M):
            for j in range(start):
                stream[i, j] = j < sinks or j >= start - window
        start += M
    return torch.stack((causal, stream))


def run(layer: SingleLayer, q: Tensor, k: Tensor, v: Tensor, chunks: list[int]) -> Tensor:
    parts = [each.split(chunks, dim=2) for each in (q, k, v)]
    return torch.cat([layer(*piece) for piece in zip(*parts)], 2)


def qkv(N: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, N, 8), torch.randn(B, 2, N, 8), torch.randn(B, 2, N, 8)


@pytest.mark.parametrize(
    "chunks",
    [
        [20, *[1] * 25],
        [3, *[1] * 30],
        [20, 7, 1, 1, 1, 5, 2, 1, 1, 1, 1, 30, 1, 1],
        [2, 2, 2, 2, 2, 2, 1, 2, 1],
        [9, 1, 1, 9, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1],
    ],
    ids=["decode", "short-prompt", "mixed", "small-chunks", "long-ring"],
)
@pytest.mark.parametrize(("sinks", "window"), [(3, 6), (0, 4), (2, 1)])
def test_chunks_and_decoding_equal_a_masked_dense_pass(chunks: list[int], sinks: int, window: int) -> None:
    q, k, v = qkv(sum(chunks))
    layer = SingleLayer(bound(sinks=sinks, window=window))
    out = run(layer, q, k, v, chunks)
    torch.testing.assert_close(out, dense(q, k, v, deployed_mask(chunks, sinks, window)[None]), rtol=1e-5, atol=1e-5)
    N = sum(chunks)
    expected = [*range(min(sinks, N)), *range(max(sinks, N - window), N)]
    assert layer.cache.kept_positions(1, 1).tolist() == expected
    assert layer.cache.kept_positions(1, 0).tolist() == list(range(N))


def test_left_padding_sinks_are_the_first_real_tokens() -> None:
    q, k, v = qkv(40)
    positions = torch.stack((torch.arange(40), torch.arange(40) - 15)).clamp_min(-1)
    layer = SingleLayer(bound(sinks=2, window=5))
    padded = [layer(q[:, :, :30], k[:, :, :30], v[:, :, :30], positions=positions[:, :30])]
    padded += [
        layer(*(each[:, :, t : t + 1] for each in (q, k, v)), positions=positions[:, t : t + 1]) for t in range(30, 40)
    ]
    alone = run(SingleLayer(layer.method), *(each[1:, :, 15:] for each in (q, k, v)), [15, *[1] * 10])
    torch.testing.assert_close(torch.cat(padded, 2)[1:, :, 15:], alone, rtol=1e-5, atol=1e-6)
    assert layer.cache.kept_positions(1, 1).tolist() == [0, 1, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"sinks": 30, "window": 30}, {"sinks": 0, "window": 60}])
def test_without_anything_to_drop_it_is_dense(options: dict[str, float]) -> None:
    q, k, v = qkv(50)
    out = run(SingleLayer(bound(**options)), q, k, v, [30, 10, *[1] * 10])
    torch.testing.assert_close(
        out, dense(q, k, v, torch.ones(1, 2, 50, 50, dtype=torch.bool).tril()), rtol=1e-5, atol=1e-6
    )


def test_kvpress_variant_masks_the_prompt_once() -> None:
    q, k, v = qkv(40)
    layer = SingleLayer(bound(sinks=3, window=6, variant="kvpress"))
    out = run(layer, q, k, v, [30, *[1] * 10])
    mask = torch.ones(1, 2, 40, 40, dtype=torch.bool).tril()
    mask[0, 1, 30:, 3:24] = False
    torch.testing.assert_close(out, dense(q, k, v, mask), rtol=1e-5, atol=1e-6)
    assert layer.cache.kept_positions(0, 1).tolist() == [0, 1, 2, *range(24, 40)]


def test_kvpress_variant_waits_for_the_end_of_a_chunked_prompt() -> None:
    q, k, v = qkv(30)
    layer = SingleLayer(bound(sinks=3, window=6, variant="kvpress"), chunked=True)
    run(layer, q, k, v, [20, 10])
    assert layer.cache.stored == 30
    layer.finish_prefill()
    assert layer.cache.kept_positions(0, 1).tolist() == [0, 1, 2, *range(24, 30)]


def test_streaming_heads_stay_at_a_constant_size() -> None:
    q, k, v = qkv(120, B=1)
    layer = SingleLayer(bound(sinks=2, window=6, sparsity=1.0))
    first, rest = ([each[:, :, part] for each in (q, k, v)] for part in (slice(60), slice(60, None)))
    run(layer, *first, [40, *[1] * 20])
    before = layer.cache.bytes()
    run(layer, *rest, [1] * 60)
    assert layer.cache.lengths().tolist() == [[8, 8]]
    assert layer.cache.bytes() == before
    assert layer.cache.seen == 120


def test_global_threshold() -> None:
    alpha = torch.tensor([[0.9, 0.2], [0.5, 0.1], [0.8, 0.7]])
    assert sparsify_heads(alpha, 0.5).tolist() == [[True, False], [False, False], [True, True]]
    assert sparsify_heads(alpha, 0.0).all()
    assert not sparsify_heads(alpha, 1.0).any()
    assert lowest_stream(alpha, 0.34).tolist() == [[True, False], [True, False], [True, True]]


def test_equal_gates_are_settled_by_order_and_ungated_heads_stay_full() -> None:
    ones = torch.ones(4, 2)
    for choose in (sparsify_heads, lowest_stream):
        assert choose(ones, 0.5).sum() == 4
        assert choose(ones, 0.5)[:2].all()
    alpha = torch.tensor([[0.3, 0.1], [torch.nan, torch.nan], [0.4, 0.2]])
    for choose in (sparsify_heads, lowest_stream):
        assert choose(alpha, 0.5).tolist() == [[True, False], [True, True], [True, False]]


def test_mix_at_its_ends() -> None:
    full, stream = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    assert torch.equal(gated_mix(full, stream, torch.ones(2)), full)
    assert torch.equal(gated_mix(full, stream, torch.zeros(2)), stream)
    assert torch.equal(
        gated_mix(full, stream, torch.tensor([1.5, -0.5])), gated_mix(full, stream, torch.tensor([1.0, 0]))
    )


def test_gradient_of_a_gate_is_the_sum_over_its_group() -> None:
    full, stream = torch.randn(1, 4, 5, 8, dtype=torch.float64), torch.randn(1, 4, 5, 8, dtype=torch.float64)
    cotangent = torch.randn_like(full)
    alpha = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    full.requires_grad_()
    gated_mix(full, stream, alpha).backward(cotangent)
    assert alpha.grad is not None
    assert full.grad is None
    torch.testing.assert_close(alpha.grad[0], ((full - stream) * cotangent)[:, :2].sum())
    assert alpha.grad[1] == 0


def test_streaming_attention_is_differentiable_and_equals_its_mask() -> None:
    q, k, v = (each.double().requires_grad_() for each in qkv(300, B=1))
    out = streaming_attention(q, k, v, sinks=3, window=20)
    mask = streaming_plan(3, 20).to_mask(300, 300)[0, 0]
    i, j = torch.arange(300)[:, None], torch.arange(300)[None]
    assert torch.equal(mask, (j <= i) & ((i - j < 20) | (j < 3)))
    expected = dense(q, k, v, mask.expand(1, 2, -1, -1))
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), cotangent)
    theirs = torch.autograd.grad(expected, (q, k, v), cotangent)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_a_missing_profile_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    model = tiny()
    with pytest.raises(ProfileError, match="foveate calibrate duo"):
        apply(model, "duo")
    assert model.config._attn_implementation != "foveate"
    with pytest.raises(ProfileError, match="foveate calibrate duo"):
        SingleLayer(Duo(sinks=2, window=3))(*qkv(20))


def test_foreign_damaged_and_misshapen_profiles_are_refused(tmp_path: object) -> None:
    other = dataclasses.replace(IDENTITY, fingerprint="other")
    with pytest.raises(ProfileError, match="another model: fingerprint"):
        Duo(profile=table_profile("duo", other, alpha=GATES)).for_model(IDENTITY)
    with pytest.raises(ProfileError, match="'razor' profile, and 'duo' is needed"):
        Duo(profile=Profile("razor", IDENTITY, {"alpha": GATES})).for_model(IDENTITY)
    with pytest.raises(ProfileError, match=r"'alpha' is of shape \[2, 1\], allowed: \[1, 2\]"):
        Duo(profile=table_profile("duo", IDENTITY, alpha=GATES.T)).for_model(IDENTITY)
    with pytest.raises(ProfileError, match="'alpha' is missing"):
        Duo(profile=table_profile("duo", IDENTITY, beta=GATES)).for_model(IDENTITY)
    folder = table_profile("duo", IDENTITY, alpha=GATES).save(f"{tmp_path}/duo")
    assert Duo(profile=str(folder)).for_model(IDENTITY).full_heads.tolist() == [[True, False]]
    (folder / "profile.safetensors").write_bytes(b"nothing")
    with pytest.raises(ProfileError, match="damaged"):
        Duo(profile=str(folder)).for_model(IDENTITY)


def test_bad_options() -> None:
    for options, message in (
        ({"window": 0}, "window=0, allowed: >= 1"),
        ({"sinks": -1}, "sinks=-1, allowed: >= 0"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"variant": "other"}, "variant='other', allowed: "),
    ):
        with pytest.raises(OptionError, match=message):
            create("duo", **options)
    with pytest.raises(ShapeError, match=r"\[layers, Hkv\]"):
        sparsify_heads(torch.rand(4), 0.5)
    with pytest.raises(ShapeError, match="do not fit"):
        gated_mix(torch.rand(1, 4, 3, 8), torch.rand(1, 4, 3, 8), torch.rand(3))
