"""EchoAtt against a forward pass written out by hand: the method, the students, their cache and their training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchEncoding

from foveate.errors import CompositionError, DataError, OptionError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import apply
from foveate.hf.calibrate import calibrate
from foveate.hf.compat import cache_keyword, new_dynamic_cache
from foveate.lm.echoatt import EchoAttention, load_student, share_attention, weights_of
from foveate.lm.echoatt_adjust import AdjustConfig, adjust, distillation_loss
from foveate.methods import SingleLayer, create
from foveate.methods.calibrated import table_profile
from foveate.methods.profile import ModelIdentity
from foveate.methods.select.echoatt import EchoAtt, layer_similarity, sharing_groups
from foveate.tasks.perplexity import Perplexity
from tests.methods.driving import random_qkv
from tests.models import GREEDY, prompts, tiny
from tests.toy_tokenizer import ToyTokenizer

GROUPS: dict[str, list[tuple[int, ...]]] = {"0-1": [(0, 1)], "1-2": [(1, 2)], "0-2": [(0, 1, 2)]}


class WordTokenizer(ToyTokenizer):
    """Gives ids as transformers' tokenizers do."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        return BatchEncoding(super().__call__(text))

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer").touch()


def half_turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def by_hand(model: Any, ids: Tensor, groups: list[tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """Logits of a whole pass of the teacher in which followers use their leaders' weights, and all layers' weights."""
    x = model.model.embed_tokens(ids)
    B, N, _ = x.shape
    cos, sin = (each[:, None] for each in model.model.rotary_emb(x, torch.arange(N)[None]))
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    leaders = {layer: group[0] for group in groups for layer in group}
    weights: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        own, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (each(y).view(B, N, -1, 16).transpose(1, 2) for each in (own.q_proj, own.k_proj, own.v_proj))
        q, k = (each * cos + half_turned(each) * sin for each in (q, k))
        scores = q @ k.repeat_interleave(2, 1).mT * 16**-0.5
        weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        a = weights[leaders.get(index, index)]
        o = (a @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(B, N, -1)
        x = x + own.o_proj(o)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x)), weights


def in_pieces(model: Any, ids: Tensor, cache: Any, pieces: list[int]) -> Tensor:
    given = {cache_keyword(model): cache, "use_cache": True}
    with torch.no_grad():
        return torch.cat([model(piece, **given).logits for piece in ids.split(pieces, 1)], 1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return prompts(rows=2, length=24, pads=(0, 0))[0]


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("listed", GROUPS)
@torch.no_grad()
def test_method_equals_the_definition(model: Any, ids: Tensor, listed: str, materialise: bool) -> None:
    expected, _ = by_hand(model, ids, GROUPS[listed])
    with apply(model, "echoatt", groups=listed, materialise=materialise) as run:
        made = in_pieces(model, ids, run.new_cache(), [14, 1, 1, 6, 1, 1])
        assert run.stats.decode_density == pytest.approx(1 - (len(GROUPS[listed][0]) - 1) / 6)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(expected, model(ids).logits, atol=1e-3)


def test_a_follower_weighs_its_own_values() -> None:
    method = EchoAtt(first=0, last=0)
    leader, follower = (SingleLayer(method, layer=layer, layers=2) for layer in range(2))
    follower.run = leader.run
    (q, k, v), (other_q, other_k, other_v) = random_qkv(), random_qkv()
    for part in (slice(0, 30), slice(30, 31), slice(31, 38), slice(38, 40)):
        leader(*(x[:, :, part] for x in (q, k, v)))
        made = follower(*(x[:, :, part] for x in (other_q, other_k, other_v)))
        mask = torch.ones(40, 40, dtype=torch.bool).tril()[part, : part.stop]
        keys, values = (x[:, :, : part.stop].repeat_interleave(2, 1) for x in (k, other_v))
        scores = (q[:, :, part] @ keys.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(made, scores.softmax(-1) @ values, rtol=1e-6, atol=1e-6)


def test_layers_share_without_a_cache_too(model: Any, ids: Tensor) -> None:
    with apply(model, "echoatt", groups="0-1"), torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, model(ids, use_cache=True).logits)


def test_the_method_refuses_what_it_cannot_share(model: Any, ids: Tensor) -> None:
    hybrid = tiny("gemma3_text")
    with apply(hybrid, "echoatt", groups="0-1"), pytest.raises(UnsupportedModelError, match="sliding window"):
        hybrid(ids)
    with pytest.raises(OptionError, match="layers from 0 to 2"):
        apply(model, "echoatt", groups="1-3")
    with pytest.raises(OptionError, match=r"first=4, allowed: with last=4, at least two of this model's 3"):
        apply(model, "echoatt")
    for bad in ("0", "1-1", "2-1", "0-2/2-3", "x-y"):
        with pytest.raises(OptionError, match=f"groups='{bad}', allowed: spans"):
            create("echoatt", groups=bad)
    with pytest.raises(OptionError, match=r"threshold=0\.5, allowed: None"):
        create("echoatt", groups="0-1", threshold=0.5)
    with pytest.raises(CompositionError, match="EchoAtt"):
        create("echoatt+snapkv")


def test_groups() -> None:
    assert sharing_groups(10, 2, 2, 2) == ((2, 3), (4, 5), (6, 7))
    assert sharing_groups(10, 2, 1, 3) == ((2, 3, 4), (5, 6, 7))
    assert sharing_groups(30, 4, 4, 4)[-2:] == ((20, 21, 22, 23), (24, 25))
    assert sharing_groups(10, 2, 2, 1) == ()
    similarity = torch.zeros(6, 6)
    similarity[0, 1] = similarity[2, 3] = similarity[2, 4] = 0.9
    similarity[2, 5] = torch.nan
    assert sharing_groups(6, 0, 0, 6, similarity.tolist(), 0.8) == ((0, 1), (2, 3, 4))
    assert sharing_groups(6, 0, 0, 2, similarity.tolist(), 0.8) == ((0, 1), (2, 3))
    identity = ModelIdentity("toy", 6, 4, 2, 8, "none")
    profile = table_profile("echoatt", identity, similarity=similarity)
    bound = EchoAtt(first=0, last=0, size=6, threshold=0.8, profile=profile).for_model(identity)
    assert bound.sharing(6) == ((0, 1), (2, 3, 4))


def test_similarity_is_the_mean_cosine_of_rows() -> None:
    a = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            cosines = [F.cosine_similarity(a[i, h, t], a[j, h, t], dim=0) for h in range(2) for t in range(4)]
            assert layer_similarity(a)[i, j] == pytest.approx(float(sum(cosines)) / 8)


def test_calibration_compares_the_models_weights(model: Any, tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    settings = {"length": 24, "samples": 2, "queries": 100, "progress": False}
    profile = calibrate("echoatt", model, tokenizer, out=tmp_path / "echoatt", **settings)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(2):
        example = Perplexity(target=12).example(tokenizer, 24, seed)
        with torch.no_grad():
            weights = by_hand(model, torch.tensor([example.context + example.target]), [])[1]
        expected += layer_similarity(torch.stack([each[0, :, 6:] for each in weights])) / 2
    torch.testing.assert_close(profile.tensors["similarity"], expected, rtol=1e-5, atol=1e-6)
    folder = str(tmp_path / "echoatt")
    with apply(model, "echoatt", first=0, last=0, size=3, threshold=0.0, profile=folder) as run:
        assert run.method.sharing(3) == ((0, 1, 2),)  # type: ignore[attr-defined]


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("listed", GROUPS)
@torch.no_grad()
def test_student_equals_the_definition(model: Any, ids: Tensor, listed: str, materialise: bool) -> None:
    student = share_attention(model, GROUPS[listed], materialise=materialise)
    expected, _ = by_hand(model, ids, GROUPS[listed])
    torch.testing.assert_close(student(ids, use_cache=False).logits, expected, rtol=1e-4, atol=2e-5)
    cache: Any = new_dynamic_cache(student.config)
    made = in_pieces(student, ids, cache, [14, 1, 1, 6, 1, 1])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-5)
    followers = GROUPS[listed][0][1:]
    assert [layer.keys.numel() > 0 for layer in cache.layers] == [index not in followers for index in range(3)]
    saved = sum(each.numel() for each in model.parameters()) - sum(each.numel() for each in student.parameters())
    assert saved == len(followers) * 64 * (64 + 32)
    assert student.model.layers[followers[0]].self_attn.group.lead is None


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_other_families(family: str, ids: Tensor) -> None:
    other = tiny(family)
    if family == "phi3":
        with pytest.raises(UnsupportedModelError, match="qkv_proj"):
            share_attention(other, [(0, 1)])
        return
    student = share_attention(other, [(1, 2)])
    with apply(other, "echoatt", groups="1-2") as run:
        expected = in_pieces(other, ids, run.new_cache(), [20, 1, 3])
    made = in_pieces(student, ids, new_dynamic_cache(student.config), [20, 1, 3])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-5)


def test_students_generate_with_padding_and_beams(model: Any) -> None:
    student = share_attention(model, [(0, 1, 2)])
    padded, mask = prompts(length=30, pads=(11, 3, 0))
    with torch.no_grad():
        batch = student.generate(padded, attention_mask=mask, **GREEDY)[:, 30:]
        alone = [student.generate(padded[r : r + 1, mask[r] == 1], **GREEDY) for r in range(3)]
        assert torch.equal(batch, torch.cat([each[:, -10:] for each in alone]))
        beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
        both = student.generate(padded[1:], attention_mask=mask[1:], **beams)[:, 30:]
        single = student.generate(padded[2:], **beams)[:, 30:]
    assert torch.equal(both[2:], single)


@pytest.mark.parametrize("materialise", [False, True])
def test_gradients_equal_the_definition_and_reach_the_leader(model: Any, ids: Tensor, materialise: bool) -> None:
    exact = copy.deepcopy(model).double()
    student = share_attention(exact, [(0, 1, 2)], materialise=materialise)
    cotangent = torch.randn(2, 24, 128, dtype=torch.float64)
    (by_hand(exact, ids, [(0, 1, 2)])[0] * cotangent).sum().backward()
    (student(ids, use_cache=False).logits * cotangent).sum().backward()
    expected = dict(exact.named_parameters())
    for name, each in student.named_parameters():
        torch.testing.assert_close(each.grad, expected[name].grad, rtol=1e-7, atol=1e-9)
    # The same without what followers add: the leader's queries learn from them.
    alone = copy.deepcopy(model).double()
    (by_hand(alone, ids, [])[0] * cotangent).sum().backward()
    leader = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(dict(alone.named_parameters())[leader].grad, expected[leader].grad, rtol=0.1)


def test_weights_are_causal_distributions() -> None:
    q, k, _ = random_qkv()
    whole = weights_of(q, k, None, 0.3)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    assert not bool(whole.masked_select(torch.ones(40, 40, dtype=torch.bool).triu(1)).any())
    torch.testing.assert_close(weights_of(q[:, :, -1:], k, None, 0.3), whole[:, :, -1:])
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[:, :3] = False
    seen = weights_of(q, k, mask, 0.3)
    assert not bool(seen[..., :3, :].any())
    assert not bool(seen[..., :3].any())
    additive = torch.zeros(40, 40, dtype=torch.float64).masked_fill(~mask, -1e30)
    torch.testing.assert_close(weights_of(q, k, additive, 0.3)[:, :, 3:], seen[:, :, 3:])


def test_students_are_saved_and_loaded(model: Any, ids: Tensor, tmp_path: Path) -> None:
    student = share_attention(model, [(1, 2)])
    student.save_pretrained(tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    assert isinstance(loaded.model.layers[2].self_attn, EchoAttention)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(DataError, match="names no groups of layers"):
        load_student(tmp_path / "teacher")
    with pytest.raises(DataError, match="holds no student"):
        load_student(tmp_path / "nowhere")


def test_students_refuse_what_they_cannot_do(model: Any, ids: Tensor) -> None:
    student = share_attention(model, [(0, 1)])
    with apply(student, "full"), pytest.raises(UnsupportedModelError, match="do not apply a method to it"):
        student(ids)
    with pytest.raises(ValueError, match="does not support .* checkpointing"):
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    with pytest.raises(UnsupportedCacheError, match="keeps values alone, which a StaticLayer cannot"):
        student.generate(ids, cache_implementation="static", max_new_tokens=2)
    for bad in ([], [(0,)], [(0, 2)], [(1, 0)], [(0, 1), (1, 2)], [(2, 3)]):
        with pytest.raises(OptionError, match="share_attention: groups="):
            share_attention(model, bad)
    with pytest.raises(UnsupportedModelError, match="layer 0 of .* has a sliding window"):
        share_attention(tiny("gemma3_text"), [(0, 1)])


def test_adjusting_closes_the_gap_and_leaves_the_teacher_alone(model: Any, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in model.state_dict().items()}
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog lay by the door . " * 60)
    settings = {"text": (str(text),), "length": 16, "batch": 4, "accumulate": 1, "rate": 3e-3, "hidden": 10.0}
    made = adjust(
        model,
        WordTokenizer(),
        [(0, 1, 2)],
        out=tmp_path / "out",
        progress=False,
        distill_steps=40,
        tune_steps=20,
        **settings,
    )
    first, last = (sum(part) / 5 for part in (made.losses["distill"][:5], made.losses["distill"][-5:]))
    assert last < first - 0.05
    assert list(made.perplexity) == ["teacher", "shared", "distilled", "tuned"]
    assert made.perplexity["tuned"] < 0.5 * made.perplexity["distilled"]
    assert len(made.losses["tune"]) == 20
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    ids = torch.randint(3, 128, (1, 9))
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path / "out")(ids).logits, made.model(ids).logits)
    with pytest.raises(OptionError, match="hard=0, soft=0 and hidden=0"):
        adjust(model, WordTokenizer(), [(0, 1)], hard=0.0, soft=0.0, hidden=0.0)


def test_the_distillation_loss_is_its_definition() -> None:
    config = AdjustConfig(hard=0.5, soft=2.0, hidden=3.0, temperature=2.0)
    ours, theirs = torch.randn(2, 3, 7, dtype=torch.float64).float(), torch.randn(2, 3, 7)
    h = [(torch.randn(2, 3, 5), torch.randn(2, 3, 5)) for _ in range(2)]
    expected = 0.0
    for b in range(2):
        for t in range(3):
            expected += 0.5 * -float(ours[b, t].softmax(0)[theirs[b, t].argmax()].log()) / 6
            p, q = (theirs[b, t] / 2).softmax(0), (ours[b, t] / 2).softmax(0)
            expected += 2.0 * 4 * float((p * (p / q).log()).sum()) / 6
    expected += 3.0 * sum(float(((a - b) ** 2).mean()) for a, b in h)
    assert float(distillation_loss(ours, theirs, h, config)) == pytest.approx(expected, rel=1e-5)
