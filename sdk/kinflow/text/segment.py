"""Runs one segment of a language model with ONNX Runtime: tokens in, features out, caches appended.

A graph has attention in one of two forms. Apart, sessions of any lengths are run together, and all that they have is
copied for it: a server's. Fused, keys and values of the one text stay where they are: a device's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kinflow.backends.onnx import open_session
from kinflow.errors import BackendError, InputError
from kinflow.text.cache import Cache, stack
from kinflow.text.manifest import LOWER, TextManifest

Array = npt.NDArray[np.float32]


class Interrupted(Exception):
    """A run was ended from another thread; nothing has changed by it."""


class Interrupt:
    """Ends a run, from another thread, or one that has yet to begin."""

    def __init__(self) -> None:
        from onnxruntime import RunOptions

        self.options = RunOptions()
        # An end that is wanted is not worth a line.
        self.options.log_severity_level = 4

    @property
    def is_set(self) -> bool:
        return bool(self.options.terminate)

    def set(self) -> None:
        self.options.terminate = True


class Past(Protocol):
    """What a segment keeps of one text."""

    length: int

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""


class TextSegment(Protocol):
    """A segment for one text at a time, whatever form its graph has."""

    name: str

    def past(self) -> Past:
        """Of a new text, for this segment's `run` alone."""

    def run(self, tokens: npt.NDArray[Any], caches: Sequence[Any], *, interrupt: Interrupt | None = None) -> Array:
        """The features of the next positions of the one text, whose Past grows by them.

        Raises BackendError, and Interrupted.
        """


class Session:
    """One InferenceSession with checked names."""

    def __init__(self, data: bytes, path: str, threads: int) -> None:
        self.session = open_session(data, path, threads)
        self.path = path

    @property
    def inputs(self) -> set[str]:
        return {node.name for node in self.session.get_inputs()}

    def check(self, inputs: set[str], outputs: list[str]) -> None:
        """Raises BackendError."""
        found, made = self.inputs, [node.name for node in self.session.get_outputs()]
        if found != inputs or made != outputs:
            raise BackendError(
                f"{self.path} has the inputs {sorted(found)} and outputs {made}, not {sorted(inputs)} and {outputs}"
            )

    @property
    def fused(self) -> bool:
        """The form of its attention."""
        return "past" not in self.inputs

    def run(self, inputs: dict[str, Any], interrupt: Interrupt | None = None) -> list[Any]:
        with self.failing(interrupt):
            return list(self.session.run(None, inputs, interrupt and interrupt.options))

    @contextmanager
    def failing(self, interrupt: Interrupt | None) -> Iterator[None]:
        """Of runs: raises what they do in its own words."""
        try:
            yield
        except Exception as exc:
            if interrupt is not None and interrupt.is_set:
                raise Interrupted from exc
            raise BackendError(f"{self.path}: {exc}") from exc


class Runner:
    """What runners of both forms begin with."""

    def __init__(self, name: str, session: Session, manifest: TextManifest) -> None:
        self.name = name
        self._input = "ids" if name == LOWER else "hidden"
        self._session = session
        self._manifest = manifest
        self._layers = manifest.segments[name].layers


class SegmentRunner(Runner):
    """A trunk segment or a branch, attention apart. For several threads, each with caches of its own."""

    def __init__(self, name: str, session: Session, manifest: TextManifest) -> None:
        """Raises BackendError."""
        super().__init__(name, session, manifest)
        session.check({self._input, "past", "positions", "bias"}, ["result", "present"])

    def past(self) -> Cache:
        """Of a new session."""
        return Cache(self._layers, self._manifest.kv_heads, self._manifest.head_size)

    def run(
        self,
        tokens: npt.NDArray[Any],
        caches: Sequence[Cache],
        counts: Sequence[int] = (),
        *,
        interrupt: Interrupt | None = None,
    ) -> Array:
        """The features of the next positions of each session, whose caches grow by them.

        `tokens`: int64 ids [sessions, tokens], or float32 features [sessions, tokens, width]. `counts`: how many of
        them each session really has, where they differ: the rest is padding, its features mean nothing. Raises
        BackendError, Interrupted, and InputError when a session has no tokens.
        """
        counts = counts or [tokens.shape[1]] * len(caches)
        if min(counts) < 1:
            raise InputError(f"segment {self.name!r}: each session must bring at least one token")
        batch = stack(caches, tokens.shape[1])
        hidden: Array
        hidden, present = self._session.run({self._input: tokens, **batch._asdict()}, interrupt)
        for cache, count, row in zip(caches, counts, present, strict=True):
            cache.append(row[:count])
        return hidden
