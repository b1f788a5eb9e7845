"""Byte-level BPE as tokenizer.json, from tokens and merges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def byte_level(tokens: Sequence[str], merges: Iterable[str], special: Sequence[str]) -> bytes:
    """tokenizer.json of a GPT-2 style tokenizer that takes digits one by one.

    `tokens`: by id, bytes written as GPT-2 does; `merges`: "left right", best first; `special`: tokens that no text
    is cut into.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    made: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return bytes(made.to_str().encode())
