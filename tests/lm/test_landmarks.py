"""Landmark tokens in data, vocabulary and generation."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from foveate.errors import DataError, OptionError, ShapeError
from foveate.lm import HybridConfig, HybridLM
from foveate.lm.data import PackedText
from foveate.lm.landmarks import (
    ForceLandmarks,
    add_landmark_token,
    insert_landmarks,
    length_with_landmarks,
    remove_landmarks,
    with_landmarks,
)
from foveate.lm.synthetic import IGNORED, Examples, recall

MARK = 99


def test_a_landmark_follows_every_full_block():
    tokens = torch.arange(1, 8)[None]
    assert insert_landmarks(tokens, 4, MARK).tolist() == [[1, 2, 3, MARK, 4, 5, 6, MARK, 7]]
    assert insert_landmarks(tokens[:, :2], 4, MARK).tolist() == [[1, 2]]
    assert insert_landmarks(tokens[:, :3], 4, MARK).tolist() == [[1, 2, 3, MARK]]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("block", [2, 4])
def test_removing_landmarks_gives_the_tokens_back(length, block):
    tokens = torch.randint(0, 50, (3, length))
    marked = insert_landmarks(tokens, block, MARK)
    assert marked.shape[1] == length_with_landmarks(length, block)
    assert (marked[:, block - 1 :: block] == MARK).all()
    assert torch.equal(remove_landmarks(marked, block), tokens)


def test_labels_stay_with_their_tokens():
    data = Examples(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[12, 13, 14, 15, 16]]))
    marked = with_landmarks(data, block=3, landmark=MARK)
    assert marked.inputs.tolist() == [[1, 2, MARK, 3, 4, MARK, 5]]
    assert marked.labels.tolist() == [[12, 13, IGNORED, 14, 15, IGNORED, 16]]


def test_labels_move_to_the_landmark_where_it_predicts():
    text = PackedText(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]]))
    marked = with_landmarks(text, block=3, landmark=MARK, predict="landmark")
    assert marked.tokens.tolist() == [[1, 2, MARK, 3, 4, MARK, 5]]
    assert marked.targets.tolist() == [[2, IGNORED, 3, 4, IGNORED, 5, 6]]
    assert set(marked[0]) == {"input_ids", "labels", "shift_labels"}


def test_bad_input_is_refused():
    data = recall(2, vocab=64, length=16)
    with pytest.raises(OptionError, match="block=1, allowed: >= 2"):
        insert_landmarks(data.inputs, 1, MARK)
    with pytest.raises(ShapeError, match=r"tokens \[16\], allowed: \[B, N\]"):
        insert_landmarks(data.inputs[0], 4, MARK)
    with pytest.raises(OptionError, match="predict='both', allowed: 'token', 'landmark'"):
        with_landmarks(data, block=4, landmark=MARK, predict="both")
    with pytest.raises(DataError, match="the data has token"):
        with_landmarks(data, block=4, landmark=int(data.inputs[0, 0]))
    isolated = PackedText(data.inputs, data.labels, torch.zeros_like(data.inputs))
    with pytest.raises(DataError, match="isolated documents"):
        with_landmarks(isolated, block=4, landmark=MARK)


def tiny(spec: str = "landmark:block=4,retrieve=1,chunk=1") -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(HybridConfig(mixers=[spec] * 2, dim=16, heads=2, vocab_size=20, mlp_ratio=0)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_the_new_token_starts_as_the_mean_of_the_others(tied):
    model = tiny()
    if not tied:
        config = HybridConfig(mixers=["landmark"], dim=16, heads=2, vocab_size=20, mlp_ratio=0, tie_embeddings=False)
        model = HybridLM(config)
    before = model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()
    assert add_landmark_token(model) == 20
    assert model.config.vocab_size == 21
    for old, new in zip(before, (model.embed_tokens.weight, model.lm_head.weight)):
        assert torch.equal(new[:20], old)
        assert torch.allclose(new[20], old.mean(0))
    assert model(torch.tensor([[1, 20]])).logits.shape == (1, 2, 21)


def test_generation_inserts_landmarks_and_reads_their_predictions():
    model = tiny()
    mark = add_landmark_token(model)
    prompt = insert_landmarks(torch.tensor([[3, 5, 7, 2, 4], [1, 1, 8, 9, 2]]), 4, mark)
    force = LogitsProcessorList([ForceLandmarks(4, mark)])
    made = model.generate(prompt, max_new_tokens=9, do_sample=False, logits_processor=force)
    assert (made[:, 3::4] == mark).all()
    assert not (remove_landmarks(made, 4) == mark).any()
    # By hand: the same forward over all, and the best regular token at each place that predicts one.
    logits = model(made).logits
    logits[..., mark] = -torch.inf
    for place in range(prompt.shape[1], made.shape[1]):
        if place % 4 != 3:
            assert torch.equal(made[:, place], logits[:, place - 1].argmax(-1))
