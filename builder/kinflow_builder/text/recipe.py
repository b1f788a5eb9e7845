"""A text family's recipe.toml as typed structs. Unknown keys are errors: a typo must not pass."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec

from kinflow.errors import SettingsError
from kinflow.manifest import Positive, PositiveFloat
from kinflow.messages import Name
from kinflow_builder.recipe import RECIPE, Fraction
from kinflow_builder.text.cut import Cut
from kinflow_builder.wheels import Weights


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all below."""


class Gguf(_Strict, frozen=True, tag_field="kind", tag="gguf"):
    """A GGUF file that a package index carries inside a wheel."""

    weights: Weights


class HuggingFace(_Strict, frozen=True, tag_field="kind", tag="huggingface"):
    """A folder with config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""

    directory: str
    """Relative to the recipe's folder; --data goes before it."""


class Corpus(_Strict, frozen=True):
    """What the model writes to train its branches on (corpus.py)."""

    batches: Positive
    texts: Positive
    """In each batch."""
    tokens: Positive
    """Of each text."""
    temperature: PositiveFloat
    """Of every second answer; the others are greedy."""
    openings: Annotated[list[str], msgspec.Meta(min_length=1)]
    """How questions may begin."""


class Training(_Strict, frozen=True):
    """How branches learn (distil.py)."""

    epochs: Positive
    texts: Positive
    """In each step."""
    learning_rate: PositiveFloat
    hidden_weight: Annotated[float, msgspec.Meta(ge=0)]
    """Weight of the distance to the model's last hidden values, beside the divergence of the probabilities."""
    seed: int
    threads: Positive


class Check(_Strict, frozen=True):
    """What the figures are measured on, besides the text and the prompts that --data has."""

    texts: Positive
    """The model's own greedy ones."""
    tokens: Positive
    """Of each."""
    written_tokens: Positive
    """Of the text that people wrote, for perplexity."""
    epsilon: Fraction
    """Of the certificates: tokens that leave early and are not the largest member's, as a share of all."""
    delta: Fraction


class TextRecipe(_Strict, frozen=True):
    """A text family to build. `load` is the way to make one."""

    id: Name
    version: Name
    title: str
    license: str
    context: Positive
    """Positions that a session may have."""
    model: Gguf | HuggingFace
    cut: Cut
    corpus: Corpus
    training: Training
    check: Check

    def corpus_digest(self) -> str:
        """What the saved texts are bound to: a corpus that grows keeps those that it has."""
        any_count = msgspec.structs.replace(self.corpus, batches=1)
        return _digest(self.model, any_count, self.training.seed)

    def digest(self) -> str:
        """What trained branches are bound to."""
        learning = msgspec.structs.replace(self.training, threads=1)
        return _digest(self.corpus_digest(), self.corpus.batches, self.cut, learning)


def is_text(path: Path) -> bool:
    """The recipe in this folder, or this file, is one of a text family: it has a table `cut`."""
    try:
        return "cut" in msgspec.toml.decode(_file(path).read_bytes())
    except (OSError, msgspec.DecodeError):
        return False


def load(path: Path) -> TextRecipe:
    """From a folder's recipe.toml, or a file. Raises SettingsError that names file, field and what was expected."""
    file = _file(path)
    try:
        return msgspec.toml.decode(file.read_bytes(), type=TextRecipe)
    except OSError as exc:
        raise SettingsError(f"{file}: {exc.strerror}: give the folder of a family's recipe") from exc
    except msgspec.DecodeError as exc:  # ValidationError is one of them
        raise SettingsError(f"{file}: {exc}") from exc


def _file(path: Path) -> Path:
    return path if path.suffix == ".toml" else path / RECIPE


def _digest(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()
