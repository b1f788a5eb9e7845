"""The corpus on disk, batch by batch, and what a branch learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kinflow_builder import checkpoint
from kinflow_builder.log import BuildLog
from kinflow_builder.text.conversation import speakers, tokenizer_of
from kinflow_builder.text.corpus import Written, converse
from kinflow_builder.text.distil import Lesson
from kinflow_builder.text.llama import Llama, narrowed
from kinflow_builder.text.recipe import TextRecipe
from kinflow_builder.text.shape import Model, Texts


def corpus(
    recipe: TextRecipe, model: Model, texts: Texts, work: Path, log: BuildLog, layers: Sequence[int]
) -> list[Written]:
    """All batches of the corpus; those that `work` has already are not written again.

    `layers`: after which hidden values are kept. Raises SettingsError for files of another recipe.
    """
    spec, digest = recipe.corpus, recipe.corpus_digest()
    paths = [work / f"corpus-{number:03}.pt" for number in range(spec.batches)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        llama, tokenizer = narrowed(Llama(model).to(device)), tokenizer_of(texts)
        with log.progress("the model writes", spec.batches * spec.tokens, _done(paths) * spec.tokens) as bar:
            for number in missing:
                who = list(speakers(tokenizer, spec, number, recipe.training.seed))
                seed = recipe.training.seed * 100_003 + number
                made = converse(llama, who, spec.tokens, list(layers), seed, bar.advance)
                checkpoint.save(paths[number], digest, made._asdict())
                log.line(f"corpus: batch {number + 1} of {spec.batches}, {float(made.own.float().mean()):.0%} greedy")
    return [_load(path, digest) for path in paths]


def _done(paths: Sequence[Path]) -> int:
    return sum(path.is_file() for path in paths)


def lesson(parts: Sequence[Written], layer: int) -> Lesson:
    """For a branch after so many layers."""
    return Lesson(
        features=[text for part in parts for text in part.features[layer]],
        final=[text for part in parts for text in part.final],
        likely=[text for part in parts for text in part.likely],
    )


def _load(path: Path, digest: str) -> Written:
    state = checkpoint.load(path, digest)
    assert state is not None  # written or found just now
    return Written(**state)
