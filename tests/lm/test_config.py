"""HybridConfig: what it refuses, and that it survives JSON."""

from __future__ import annotations

import pytest

from foveate.errors import OptionError, UnknownNameError
from foveate.lm import HybridConfig


def test_round_trip(tmp_path):
    config = HybridConfig(mixers=["gla:heads=4", "softmax:window=8,kv_heads=2"], dim=64, tie_embeddings=False)
    config.save_pretrained(tmp_path)
    again = HybridConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.hidden_size, again.num_hidden_layers, again.tie_word_embeddings) == (64, 2, False)
    assert HybridConfig(tie_word_embeddings=False).tie_embeddings is False


def test_an_option_in_a_spec_wins():
    config = HybridConfig(mixers=["softmax:heads=4", "softmax"], dim=64, heads=2)
    assert [config.make_mixer(n).heads for n in range(2)] == [4, 2]
    assert [config.make_mixer(n).layer for n in range(2)] == [0, 1]


def test_width_of_the_swiglu_block():
    assert HybridConfig(dim=512).mlp_width == 1536
    assert HybridConfig(dim=512, mlp_ratio=0).mlp_width == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixers": ["lightening"]}, "there is no mixer 'lightening'; did you mean lightning"),
        ({"mixers": ["softmax:windw=4"]}, "softmax has no option 'windw'; did you mean window"),
        ({"mixer": ["softmax"]}, "HybridConfig has no option 'mixer'; did you mean mixers"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(UnknownNameError, match=message):
        HybridConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 100}, "dim=100 with heads=8, allowed: a multiple"),
        ({"mixers": []}, "mixers=.., allowed: at least one layer"),
        ({"vocab_size": 0}, "vocab_size=0, allowed: >= 1"),
        ({"dropout": 1.0}, "dropout=1.0, allowed: >= 0 and < 1"),
        ({"mixers": ["softmax:window=-2"]}, "softmax: window=-2, allowed: >= 0"),
        ({"mixers": "softmax"}, r"mixers='softmax', allowed: a list of specs, such as \['softmax', 'gla'\]"),
        ({"mixers": ["softmax", 3]}, r"mixers=\['softmax', 3\], allowed: a list of specs"),
        ({"mixers": None}, "mixers=None, allowed: a list of specs"),
        ({"dim": "x"}, "dim='x', allowed: a value of type int"),
        ({"dim": 64.0}, "dim=64.0, allowed: a value of type int"),
        ({"heads": True}, "heads=True, allowed: a value of type int"),
        ({"vocab_size": None}, "vocab_size=None, allowed: a value of type int"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4', allowed: a value of type float"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio=inf, allowed: a finite number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0, allowed: > 0"),
        ({"tie_embeddings": "no"}, "tie_embeddings='no', allowed: a value of type bool"),
        ({"pad_token_id": "<pad>"}, "pad_token_id='<pad>', allowed: a value of type int"),
        ({"experts": 2, "top_experts": 3}, "top_experts=3, allowed: <= experts = 2"),
        ({"experts": 2, "mlp_ratio": 0}, "experts=2 with mlp_ratio=0, allowed: experts=0"),
        ({"dense_layers": [12]}, r"dense_layers=\[12\], allowed: layers from 0 to 11"),
        ({"spike_k": 0.0}, "spike_k=0.0, allowed: > 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(OptionError, match=message):
        HybridConfig(**options)
