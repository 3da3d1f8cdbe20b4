"""Text into blocks."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import DataError
from foveate.lm.data import MANUAL, load_tokenizer, pack, read_documents

END = 1


def test_blocks_are_the_stream_and_predict_the_next_token():
    tokenizer = load_tokenizer()
    text = pack(["abcd", "efghij"], tokenizer, 4)
    stream = [*(byte + 3 for byte in b"abcd"), END, *(byte + 3 for byte in b"efghij"), END]
    assert text.tokens.tolist() == [stream[:4], stream[4:8]]
    assert text.targets.tolist() == [stream[1:5], stream[5:9]]
    assert text.positions is None
    assert set(text[1]) == {"input_ids", "labels", "shift_labels"}


def test_isolated_documents_restart_and_ask_nothing_across_their_border():
    text = pack(["abc", "d", "efghijk"], load_tokenizer(), 5, isolate=True)
    # a b c end d | end e f g h
    assert text.positions is not None
    assert text.positions.tolist() == [[0, 1, 2, 3, 0], [0, 0, 1, 2, 3]]
    assert (text.targets == -100).tolist() == [[False, False, False, True, False], [True, *[False] * 4]]
    assert "position_ids" in text[0]


def test_a_whole_number_of_blocks_still_has_a_token_after_the_last():
    tokenizer = load_tokenizer()
    assert len(pack(["abcdefg"], tokenizer, 4)) == 1
    assert len(pack(["abcdefgh"], tokenizer, 4)) == 2


def test_splitting_holds_out_the_end():
    text = pack(["abcdefghijklmnopqrstu"], load_tokenizer(), 2)
    train, test = text.split(0.2)
    assert (len(train), len(test)) == (8, 2)
    assert torch.equal(torch.cat((train.tokens, test.tokens)), text.tokens)
    with pytest.raises(DataError, match="1 block of text cannot be split"):
        pack(["abc"], load_tokenizer(), 2).split(0.5)


def test_documents_of_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one##two## ##three", encoding="utf-8")
    assert read_documents([str(path)], "##") == ["one", "two", "three"]
    assert read_documents([str(path)]) == ["one##two## ##three"]
    assert len(read_documents([MANUAL])) > 50


def test_bad_text(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_documents([str(tmp_path / "none.txt")])
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 3"):
        read_documents([str(path)])
    path.write_text(" \n")
    with pytest.raises(DataError, match="there is no text in"):
        read_documents([str(path)])
    with pytest.raises(DataError, match="4 tokens of text make no block of 8"):
        pack(["abc"], load_tokenizer(), 8)
    with pytest.raises(DataError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "nowhere"))
