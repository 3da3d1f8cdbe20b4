"""The ballet's examples."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import OptionError
from foveate.lm.hcam_recall import ballet, ballet_length, ballet_vocabulary, whole_dances
from foveate.lm.synthetic import IGNORED

SIZES = {"dances": 5, "steps": 3, "delay": 7, "asked": 2, "cues": 9, "symbols": 4}


def test_asked_dances_are_dances_that_were_shown():
    data = ballet(20, **SIZES, seed=3)
    assert data.inputs.shape == (20, ballet_length(5, 3, 7, 2))
    shown, asked = data.inputs[:, :20].unflatten(1, (5, 4)), data.inputs[:, 27:].unflatten(1, (2, 4))
    for each, again in zip(shown.tolist(), asked.tolist()):
        cues = [dance[0] for dance in each]
        assert len(set(cues)) == 5
        assert again[0][0] != again[1][0]
        for dance in again:
            assert dance == each[cues.index(dance[0])]


def test_labels_are_the_next_symbols_of_asked_dances():
    data = ballet(20, **SIZES)
    assert (data.labels[:, :27] == IGNORED).all()
    labels, asked = data.labels[:, 27:].unflatten(1, (2, 4)), data.inputs[:, 27:].unflatten(1, (2, 4))
    assert torch.equal(labels[..., :3], asked[..., 1:])
    assert (labels[..., 3] == IGNORED).all()


def test_cues_and_symbols_are_different_tokens():
    data = ballet(50, **SIZES)
    place = torch.arange(20) % 4
    assert (data.inputs[:, :20][:, place == 0] < 9).all()
    assert (data.inputs[:, :20][:, place > 0] >= 9).all()
    assert (data.inputs[:, 20:27] >= 9).all()
    assert data.inputs.max() < ballet_vocabulary(9, 4)


def test_a_seed_tells_the_examples():
    assert torch.equal(ballet(4, seed=1).inputs, ballet(4, seed=1).inputs)
    assert not torch.equal(ballet(4, seed=1).inputs, ballet(4, seed=2).inputs)


def test_one_wrong_step_spoils_a_dance():
    labels = ballet(2, **SIZES).labels
    said = labels.clone()
    said[0, 28] += 1
    assert whole_dances(said, labels, 3).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0, allowed: >= 1"),
        ({"delay": -1}, "delay=-1, allowed: >= 0"),
        ({"dances": 65}, "dances=65, allowed: at most cues = 64"),
        ({"asked": 9}, "asked=9, allowed: at most dances = 8"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        ballet(1, **options)
