"""What a family's figures are measured on: greedy texts that the model continues, and text that people wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from kinflow.errors import InputError
from kinflow.text.tokenizer import Tokenizer
from kinflow_builder.log import BuildLog
from kinflow_builder.text.chain import Ids
from kinflow_builder.text.conversation import frame, speakers, tokenizer_of
from kinflow_builder.text.corpus import LIVELY, Speaker, converse
from kinflow_builder.text.figures import Samples
from kinflow_builder.text.llama import Llama
from kinflow_builder.text.recipe import TextRecipe
from kinflow_builder.text.shape import Model, Texts

# Positions that perplexity is measured over in one go.
WINDOW = 512
# A batch of the corpus that is never trained on.
UNSEEN = 1_000_000


def samples(recipe: TextRecipe, model: Model, texts: Texts, data: Path | None, log: BuildLog) -> Samples:
    """Half of the prompts are the field `question` in the *.jsonl of `data`, text is in its *.txt. The rest it invents.

    Raises InputError for a file that cannot be read.
    """
    tokenizer, spec = tokenizer_of(texts), recipe.check
    asked = list(_prompts(tokenizer, data, (spec.texts + 1) // 2))
    own = _own(tokenizer, recipe, spec.texts - len(asked))
    # In turn: figures come of one part of the texts and are certified with another.
    speaking = [who for pair in zip_longest(asked, own) for who in pair if who is not None]
    llama = Llama(model)
    with log.progress("greedy texts", spec.tokens) as bar:
        made = converse(llama, speaking, spec.tokens, [], UNSEEN, bar.advance)
    written = _written(tokenizer, data, spec.written_tokens)
    if written is None:
        count = max(1, spec.written_tokens // spec.tokens)
        free = [Speaker([min(tokenizer.stop_tokens)], None, LIVELY) for _ in range(count)]
        with log.progress("free texts", spec.tokens) as bar:
            written = converse(llama, free, spec.tokens, [], UNSEEN + 1, bar.advance).ids.numpy().astype(np.int64)
    return Samples(
        own=made.ids.numpy().astype(np.int64),
        chosen=made.own.numpy(),
        written=written,
        own_source="questions that people wrote, and the model's own" if asked else "the model's own questions",
        written_source="text that people wrote" if _files(data, "txt") else "free texts of the model",
    )


def _own(tokenizer: Tokenizer, recipe: TextRecipe, count: int) -> list[Speaker]:
    """Conversations as in the corpus, all with greedy answers."""
    framed = frame(tokenizer)
    chosen = speakers(tokenizer, recipe.corpus, UNSEEN, recipe.training.seed)
    return [Speaker(who.forced, framed, 0.0) for who in chosen if who.frame is not None][:count]


def _prompts(tokenizer: Tokenizer, data: Path | None, count: int) -> Iterator[Speaker]:
    framed = frame(tokenizer)
    lines = [(file, line) for file in _files(data, "jsonl") for line in file.read_text("utf-8").splitlines()]
    # Evenly over all.
    for number in np.linspace(0, len(lines) - 1, min(count, len(lines))).astype(int):
        file, line = lines[number]
        try:
            question = json.loads(line)["question"]
        except (ValueError, KeyError, TypeError) as exc:
            raise InputError(f"{file}: expected lines of JSON with a field `question`, found {line[:60]!r}") from exc
        yield Speaker(tokenizer.chat([{"role": "user", "content": question}]), framed, 0.0, asking=False)


def _written(tokenizer: Tokenizer, data: Path | None, count: int) -> Ids | None:
    text = "".join(file.read_text("utf-8") for file in _files(data, "txt"))
    if not text:
        return None
    # A token has at least a byte; most have four.
    ids = tokenizer.encode(text[: 16 * count])[:count]
    window = min(WINDOW, len(ids))
    rows = len(ids) // window
    return np.array(ids[: rows * window], np.int64).reshape(rows, window)


def _files(data: Path | None, ending: str) -> list[Path]:
    return [] if data is None else sorted(data.glob(f"*.{ending}"))
