"""A Llama-style model as numpy arrays by name: what loaders give and graphs are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]
"""One layer's, by the names in LAYER, or a branch's with `0.`, `1.` … before them and `norm` at the end."""

LAYER = ("attention_norm", "query", "key", "value", "output", "mlp_norm", "gate", "up", "down")
"""Norms are [width], matrices [outputs, inputs]."""


@dataclass(frozen=True)
class Shape:
    """All sizes of a model."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width inside an MLP."""
    context: int
    """Most positions the model was trained for."""
    theta: float
    """Base of the rotary frequencies."""
    epsilon: float
    """Of the norms."""

    @property
    def layer_macs(self) -> int:
        """Multiplications of one layer for one token, attention over the past left out."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.inner

    @property
    def layer_parameters(self) -> int:
        return self.layer_macs + 2 * self.width

    @property
    def head_macs(self) -> int:
        return self.width * self.vocabulary


@dataclass(frozen=True)
class Model:
    """A whole model."""

    shape: Shape
    embedding: Floats
    """[vocabulary, width]"""
    layers: list[Weights]
    norm: Floats
    """[width], before the head."""
    head: Floats
    """[vocabulary, width]; the embedding itself where they are tied."""


@dataclass(frozen=True)
class Texts:
    """Text <-> token ids."""

    tokenizer: bytes
    """tokenizer.json"""
    chat_template: str
    """jinja2"""
    stop_tokens: list[int]


@dataclass(frozen=True)
class Bridge:
    """A linear map of hidden values."""

    weight: Floats
    """[width, width]: outputs by inputs."""
    bias: Floats
    """[width]"""


@dataclass(frozen=True)
class Branch:
    """What belongs to one exit: a map to begin with, layers, and a norm."""

    layers: list[Weights]
    norm: Floats
    bridge: Bridge | None = None
