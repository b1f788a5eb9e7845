"""Runs one segment of a language model with ONNX Runtime: tokens in, features out, caches appended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.backends.onnx import open_session
from kinflow.errors import BackendError, InputError
from kinflow.text.cache import Cache, stack

Array = npt.NDArray[np.float32]


class _Session:
    """One InferenceSession with checked names."""

    def __init__(self, path: str, data: bytes, threads: int, inputs: set[str], outputs: list[str]) -> None:
        self._session = open_session(data, path, threads)
        found = {node.name for node in self._session.get_inputs()}
        made = [node.name for node in self._session.get_outputs()]
        if found != inputs or made != outputs:
            raise BackendError(f"{path} has the inputs {sorted(found)} and outputs {made}, not {inputs} and {outputs}")
        self._path = path

    def run(self, inputs: dict[str, Any]) -> list[Array]:
        try:
            return list(self._session.run(None, inputs))
        except Exception as exc:
            raise BackendError(f"{self._path}: {exc}") from exc


class SegmentRunner:
    """A trunk segment or a branch. For several threads, each with caches of its own."""

    def __init__(self, name: str, data: bytes, path: str, threads: int) -> None:
        """Raises BackendError."""
        self.name = name
        self._input = "ids" if name == "lower" else "hidden"
        self._session = _Session(path, data, threads, {self._input, "past", "positions", "bias"}, ["result", "present"])

    def run(self, tokens: npt.NDArray[Any], caches: Sequence[Cache], counts: Sequence[int] = ()) -> Array:
        """The features of the next positions of each session, whose caches grow by them.

        `tokens`: int64 ids [sessions, tokens], or float32 features [sessions, tokens, width]. `counts`: how many of
        them each session really has, where they differ: the rest is padding, its features mean nothing. Raises
        BackendError, and InputError when a session has no tokens.
        """
        counts = counts or [tokens.shape[1]] * len(caches)
        if min(counts) < 1:
            raise InputError(f"segment {self.name!r}: each session must bring at least one token")
        batch = stack(caches, tokens.shape[1])
        hidden, present = self._session.run({self._input: tokens, **batch._asdict()})
        for cache, count, row in zip(caches, counts, present, strict=True):
            cache.append(row[:count])
        return hidden


class HeadRunner:
    """The LM head."""

    def __init__(self, name: str, data: bytes, path: str, threads: int) -> None:
        """Raises BackendError."""
        self.name = name
        self._session = _Session(path, data, threads, {"hidden"}, ["logits"])

    def run(self, hidden: Array) -> Array:
        """Normed features [n, width] -> logits [n, vocabulary]. Raises BackendError."""
        return self._session.run({"hidden": hidden})[0]
