"""Small tokenizers of three families, trained on the spot, and one example of every task."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from foveate.tasks.base import Task
from foveate.tasks.haystack import REPEATED
from foveate.tasks.multi_turn import MultiTurn
from foveate.tasks.niah import Niah, NiahMultikey, NiahMultiquery, NiahMultivalue, NiahSingle
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.recall import Recall
from foveate.tasks.text import paragraphs
from foveate.tasks.variable_tracking import VariableTracking
from foveate.tasks.word_counts import CommonWords, FrequentWords

CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "<|start|>", "<|end|>"]
FAMILIES = ("byte-level", "metaspace", "word-level")

# Any text does; Python's whole manual takes a small tokenizer half a second per example.
_SHORT_TEXT = __file__
# Options with which each task's smallest prompt is short for tokenizers that know few words.
DRAFTED: dict[str, Task] = {
    "passkey": Passkey(),
    "niah": Niah(keys=3, values=2, queries=2),
    "niah-single": NiahSingle(),
    "niah-single-repeat": NiahSingle(haystack="repeat"),
    "niah-single-needles": NiahSingle(haystack="needles"),
    "niah-uuids": NiahSingle(haystack="needles", key="uuids", value="uuids"),
    "niah-multikey": NiahMultikey(),
    "niah-multivalue": NiahMultivalue(),
    "niah-multiquery": NiahMultiquery(value="words"),
    "multi-turn": MultiTurn(),
    "recall": Recall(queries=3),
    "recall-spread": Recall(pairs=5, queries=2),
    "variable-tracking": VariableTracking(chains=2, hops=2, worked_example=False),
    "variable-tracking-solved": VariableTracking(hops=1),
    "common-words": CommonWords(words=3, often=4, worked_example=False),
    "common-words-solved": CommonWords(words=2, often=5, seldom=2),
    "frequent-words": FrequentWords(),
}


def _text() -> list[str]:
    return [*paragraphs(None)[:150], *REPEATED, "The secret number of the 0123456789 is 7. Answer: Question: VAR"]


@functools.cache
def tokenizer(family: str) -> Any:
    """byte-level: BPE without beginning token, with chat template; metaspace: BPE with one; word-level: with <unk>."""
    if family == "word-level":
        raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        raw.train_from_iterator(_text(), trainers.WordLevelTrainer(vocab_size=2000, special_tokens=SPECIAL))
        return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    if family == "byte-level":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet)
        raw.train_from_iterator(_text(), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", chat_template=CHATML, clean_up_tokenization_spaces=False
        )
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(_text(), trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")


EVERY: dict[str, Task] = {**DRAFTED, "perplexity": Perplexity(target=40, text=_SHORT_TEXT)}
