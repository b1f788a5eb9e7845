"""How a family writes conversations down, taken from its chat template, and who speaks in a batch of training texts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kinflow.errors import InputError
from kinflow.text.tokenizer import Tokenizer
from kinflow_builder.text.corpus import LIVELY, Frame, Speaker
from kinflow_builder.text.recipe import Corpus
from kinflow_builder.text.shape import Texts

# Nothing a template would write itself.
SAID = ("Quaggy0", "Quaggy1", "Quaggy2")
# Of eight pairs of texts: five conversations, two of them about what the model likes and three that begin as the recipe
# says, and three free texts from a random word on, of all sorts of prose.
KINDS = ("own", "free", "opened", "free", "opened", "own", "free", "opened")


def tokenizer_of(texts: Texts) -> Tokenizer:
    return Tokenizer(texts.tokenizer, texts.chat_template.encode(), texts.stop_tokens)


def frame(tokenizer: Tokenizer) -> Frame:
    """Raises InputError for a template that does not write down what is said."""
    roles = ("user", "assistant", "user")
    ids = tokenizer.chat([{"role": role, "content": said} for role, said in zip(roles, SAID, strict=True)])
    rest = str(tokenizer.inner.decode(ids, skip_special_tokens=False))
    pieces = []
    for said in SAID:
        before, found, rest = rest.partition(said)
        if not found:
            raise InputError("the chat template leaves out what user or assistant say: no training texts come of it")
        pieces.append(tokenizer.encode(before))
    return Frame(pieces[0], pieces[1], pieces[2], frozenset(tokenizer.stop_tokens))


def speakers(tokenizer: Tokenizer, spec: Corpus, batch: int, seed: int) -> Iterator[Speaker]:
    """Of one batch of the corpus, always the same ones for a batch and a seed.

    One text of a pair is wilder than the other: its answers are sampled, or it is free text at the model's own
    temperature, without a token that says that a text begins.
    """
    framed, words = frame(tokenizer), _words(tokenizer)
    choice = random.Random(f"{seed}/{batch}")
    start = min(tokenizer.stop_tokens)
    for number in range(spec.texts):
        kind, wild = KINDS[number // 2 % len(KINDS)], number % 2 == 1
        if kind == "free":
            word = choice.choice(words)
            yield Speaker([word] if wild else [start, word], None, 1.0 if wild else LIVELY)
        else:
            opening = tokenizer.encode(choice.choice(spec.openings)) if kind == "opened" else []
            yield Speaker([*framed.opening, *opening], framed, spec.temperature if wild else 0.0)


def _words(tokenizer: Tokenizer) -> list[int]:
    """Tokens of letters alone, those that begin a word if there are such."""
    texts = {number: str(tokenizer.inner.decode([number])) for number in range(tokenizer.inner.get_vocab_size())}
    begin = [number for number, text in texts.items() if text[:1] == " " and text[1:].isalpha()]
    return begin or [number for number, text in texts.items() if text.isalpha()]
