"""Runs one segment of a language model with ONNX Runtime: tokens in, features out, caches appended."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.errors import BackendError, InputError
from kinflow.text.cache import Cache, stack

Array = npt.NDArray[np.float32]


class _Session:
    """One InferenceSession with checked names."""

    def __init__(self, path: str, data: bytes, threads: int, inputs: set[str], outputs: list[str]) -> None:
        if find_spec("onnxruntime") is None:
            raise BackendError("language models run on ONNX Runtime: pip install 'kinflow[onnx]'")
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's errors share no base class of their own
            raise BackendError(f"{path}: ONNX Runtime {onnxruntime.__version__} refuses it: {exc}") from exc
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
