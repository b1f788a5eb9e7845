"""How a family writes conversations down, taken from its chat template, and who speaks in a batch of training texts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kinflow.errors import InputError
from kinflow.text.tokenizer import Tokenizer
from kinflow_builder.text.corpus import Frame, Speaker
from kinflow_builder.text.recipe import Corpus
from kinflow_builder.text.shape import Texts

# Nothing a template would write itself.
SAID = ("Quaggy0", "Quaggy1", "Quaggy2")
# Of eight texts: two whose question the model thinks up, four that begin as the recipe says, two free texts.
KINDS = ("own", "own", "opened", "opened", "opened", "opened", "free", "opened free")


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
    """Of one batch of the corpus, always the same ones for a batch and a seed."""
    framed = frame(tokenizer)
    choice = random.Random(f"{seed}/{batch}")
    start = min(tokenizer.stop_tokens)
    for number in range(spec.texts):
        kind = KINDS[number // 2 % len(KINDS)]
        opening = tokenizer.encode(choice.choice(spec.openings)) if kind.startswith("opened") else []
        if kind.endswith("free"):
            yield Speaker([start, *opening], None, 0.0)
        else:
            yield Speaker([*framed.opening, *opening], framed, spec.temperature if number % 2 else 0.0)
