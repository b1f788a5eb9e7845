"""Runs a segment whose graph has attention fused: keys and values of the one text stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.text.cache import FIRST_CAPACITY
from kinflow.text.manifest import TextManifest
from kinflow.text.segment import Interrupt, Runner, Session

Array = npt.NDArray[np.float32]


class FusedPast:
    """Keys and values of one text: each layer's in memory that is written in place, and doubled when it is full."""

    def __init__(self, names: Sequence[str], session: Any, kv_heads: int, head_size: int) -> None:
        self.length = 0
        self.binding = session.io_binding()
        self._rooms: dict[str, Array] = {name: np.zeros((1, kv_heads, 0, head_size), np.float32) for name in names}
        self._capacity = 0

    def reserve(self, tokens: int) -> None:
        """Make room for so many more positions."""
        needed = self.length + tokens
        if needed <= self._capacity:
            return
        self._capacity = max(needed, 2 * self._capacity, FIRST_CAPACITY)
        for name, old in self._rooms.items():
            room = np.zeros((*old.shape[:2], self._capacity, old.shape[3]), np.float32)
            room[:, :, : self.length] = old[:, :, : self.length]
            self._rooms[name] = room
            value = shared(room)
            # Output and input are the same memory: then the graph adds to it.
            self.binding.bind_ortvalue_input(f"{name}.past", value)
            self.binding.bind_ortvalue_output(name, value)

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.length = min(self.length, length)


class FusedRunner(Runner):
    """A trunk segment or a branch, attention fused: one text at a time. For several threads, a text in each."""

    def __init__(self, name: str, session: Session, manifest: TextManifest) -> None:
        """Raises BackendError."""
        super().__init__(name, session, manifest)
        self._names = [f"{kind}.{index}" for index in range(self._layers) for kind in ("key", "value")]
        past = {f"{name}.past" for name in self._names}
        session.check({self._input, "last", "total"} | past, ["result", *self._names])

    def past(self) -> FusedPast:
        """Of a new text."""
        return FusedPast(self._names, self._session.session, self._manifest.kv_heads, self._manifest.head_size)

    def run(
        self, tokens: npt.NDArray[Any], caches: Sequence[FusedPast], *, interrupt: Interrupt | None = None
    ) -> Array:
        """`tokens`: int64 ids [1, tokens], or float32 features [1, tokens, width]. Raises BackendError, Interrupted."""
        (past,) = caches
        count = tokens.shape[1]
        past.reserve(count)
        total = past.length + count
        result = np.empty((1, count, self._manifest.width), np.float32)
        given = {
            self._input: np.ascontiguousarray(tokens),
            "last": np.array([total - 1], np.int32),
            "total": np.array([total], np.int32),
        }
        with self._session.failing(interrupt):
            for name, values in given.items():
                past.binding.bind_cpu_input(name, values)
            past.binding.bind_ortvalue_output("result", shared(result))
            self._session.session.run_with_iobinding(past.binding, interrupt and interrupt.options)
        past.length = total
        return result


def shared(values: Array) -> Any:
    """An OrtValue whose memory is that of `values`."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(values)
