"""Associative recall: a list of key-value pairs, and one key to look up.

As in MQAR (Zoology, arXiv 2312.04927), keys and values follow each other and a key that comes back must call its value;
here in words, for a pretrained model, with the same key-value form before and after:

    amber-castle: 4821
    ...
    amber-castle:                 the model goes on

`pairs=None` fills the whole length with pairs; a number spreads that many over filler sentences.

Differs from MQAR: text, not bare token ids; `queries` lookups per example, as turns on copies of the context, not in one sequence.
"""
