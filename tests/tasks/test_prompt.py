"""The fit, the frames of chat templates, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.errors import OptionError
from foveate.tasks.multi_turn import MultiTurn
from foveate.tasks.passkey import Passkey
from foveate.tasks.prompt import Draft, Frame, Question, assemble, beginning, encode, frame
from tests.tasks.tokenizers import tokenizer


class Letters:
    """One token per letter; drops `deaf_to`."""

    bos_token_id = None
    chat_template = None

    def __init__(self, deaf_to: str = "") -> None:
        self.deaf_to = deaf_to

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text if letter not in self.deaf_to]}


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def draft(body: Any, most: int | None = None) -> Draft:
    return Draft(body, " xyz", (Question("q", "c", ("answer",)),), most)


def fit(body: Any, length: int, **options: Any) -> tuple[str, int]:
    context, _, units = assemble("t", Letters(), draft(body, **options), length, chat=False, on_one_cache=True)
    return text_of(context), units


def test_as_many_units_as_fit_then_padding_from_its_beginning() -> None:
    # "\n\nq c" takes 5 tokens; "abcd" 4 each; 20 - 5 = 15 = 3 units and 3 letters " xy".
    assert fit(lambda units: "abcd" * units, 20) == ("abcdabcdabcd xy", 3)
    assert fit(lambda units: "abcd" * units, 17) == ("abcdabcdabcd", 3)


def test_padding_is_repeated_when_units_are_long() -> None:
    assert fit(lambda units: "a" * 50 * units, 15) == (" xyz xyz x", 0)


@pytest.mark.parametrize("unit", [lambda k: k, lambda k: 7 * k, lambda k: k * k + k, lambda k: 100 * min(k, 3) + k])
@pytest.mark.parametrize("room", [0, 1, 6, 99, 1000, 4096])
def test_the_search_finds_the_largest_number_of_units(unit: Any, room: int) -> None:
    expected = max(k for k in range(room + 1) if unit(k) <= room)
    assert fit(lambda units: "a" * unit(units), room + 5)[1] == expected


def test_an_end_of_units_is_an_error_that_names_it() -> None:
    with pytest.raises(OptionError, match="t: length=100, allowed: <= 17"):
        fit(lambda units: "abcd" * units, 100, most=3)
    assert fit(lambda units: "abcd" * units, 17, most=3)[1] == 3


def test_a_tokenizer_without_tokens_for_the_padding_is_refused() -> None:
    with pytest.raises(OptionError, match="makes no tokens of ' xyz'"):
        assemble("t", Letters("xyz "), draft(lambda k: "abcd" * k), 21, chat=False, on_one_cache=True)


def test_the_number_of_new_tokens_covers_the_answer() -> None:
    question = Question("q", "c", ("four", "eleven char"))
    _, questions, _ = assemble(
        "t", Letters(), Draft(lambda k: "", " xyz", (question,)), 5, chat=False, on_one_cache=True
    )
    assert questions[0][1] >= len(" four, and eleven char")


def test_plain_frames_add_nothing() -> None:
    assert frame("t", tokenizer("byte-level"), False) == Frame("", "", "", True)
    assert beginning(tokenizer("byte-level")) == []
    assert beginning(tokenizer("metaspace")) == [tokenizer("metaspace").bos_token_id]


def test_encode_adds_no_special_tokens() -> None:
    assert tokenizer("metaspace").bos_token_id not in encode(tokenizer("metaspace"), "The cat")


def test_a_chat_prompt_reads_as_the_template_writes_it() -> None:
    tok, task = tokenizer("byte-level"), MultiTurn(chat=True, questions=2)
    example = task.example(tok, 700, 3)
    first, second = (tok.decode(turn.question) for turn in example.turns)
    context = tok.decode(example.context)
    opening = "<|start|>user\n"
    assert context.startswith(opening)
    key_1, key_2 = (part.split("secret number of ")[1].split("?")[0] for part in (first, second))
    asked = [f"What is the secret number of {key}?" for key in (key_1, key_2)]
    cues = [f"The secret number of {key} is" for key in (key_1, key_2)]
    user = f"{context.removeprefix(opening)}\n\n{asked[0]}"
    messages = [{"role": "user", "content": user}]
    expected = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + cues[0]
    assert context + first == expected
    messages += [{"role": "assistant", "content": cues[0] + " 7."}, {"role": "user", "content": asked[1]}]
    expected = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + cues[1]
    assert context + first + " 7." + second == expected


def test_turns_on_copies_follow_the_context_in_a_chat_too() -> None:
    tok = tokenizer("byte-level")
    shared = MultiTurn(chat=True).example(tok, 700, 3)
    copies = MultiTurn(chat=True, turns_share_cache=False).example(tok, 700, 3)
    assert shared.context == copies.context
    assert shared.turns[0] == copies.turns[0]
    assert tok.decode(shared.turns[1].question).startswith("<|end|>\n<|start|>user\nWhat")
    assert tok.decode(copies.turns[1].question).startswith("\n\nWhat")


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(OptionError, match="passkey: chat=True, but the tokenizer has no chat template"):
        Passkey(chat=True).example(tokenizer("metaspace"), 500, 0)


def test_a_template_that_changes_the_text_is_refused() -> None:
    class Shouting(Letters):
        chat_template = "upper"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
            return "".join(each["content"].lower() for each in messages)

    with pytest.raises(OptionError, match="the chat template changes the text"):
        frame("passkey", Shouting(), True)
