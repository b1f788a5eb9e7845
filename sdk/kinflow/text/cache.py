"""Keys and values of one session in one segment, and how several sessions become one batch. No I/O.

The position axis comes first: a session's past is one contiguous block, and cropping changes one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
MASKED = np.float32(-1e9)
FIRST_CAPACITY = 64


class Cache:
    """Grows as needed; holds float32 [length, layers, 2, kv heads, head size]."""

    def __init__(self, layers: int, kv_heads: int, head_size: int) -> None:
        self._entry = (layers, 2, kv_heads, head_size)
        self._buffer: Array = np.zeros((0, *self._entry), np.float32)
        self.length = 0

    @property
    def past(self) -> Array:
        """A view of what is there."""
        return self._buffer[: self.length]

    @property
    def bytes(self) -> int:
        return self._buffer.nbytes

    def append(self, present: Array) -> None:
        """`present`: [tokens, layers, 2, kv heads, head size]."""
        end = self.length + len(present)
        if end > len(self._buffer):
            grown = np.zeros((max(end, 2 * len(self._buffer), FIRST_CAPACITY), *self._entry), np.float32)
            grown[: self.length] = self.past
            self._buffer = grown
        self._buffer[self.length : end] = present
        self.length = end

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.length = min(self.length, length)


class Batch(NamedTuple):
    """A graph's inputs beside the tokens."""

    past: Array
    """[sessions, longest past, layers, 2, kv heads, head size], padded with zeros behind"""
    positions: npt.NDArray[np.int64]
    """[sessions, tokens]"""
    bias: Array
    """[sessions, 1, tokens, longest past + tokens]: 0 where a token may look, else -1e9"""


def stack(caches: Sequence[Cache], tokens: int) -> Batch:
    """The next `tokens` positions of each session. A session that has fewer ignores its last outputs."""
    lengths = np.array([cache.length for cache in caches])
    longest = int(lengths.max())
    if len(caches) == 1:
        past = caches[0].past[None]
    else:
        past = np.zeros((len(caches), longest, *caches[0].past.shape[1:]), np.float32)
        for row, cache in enumerate(caches):
            past[row, : cache.length] = cache.past
    bias = np.zeros((len(caches), 1, tokens, longest + tokens), np.float32)
    bias[:, :, :, longest:] = np.triu(np.full((tokens, tokens), MASKED), 1)
    for row, length in enumerate(lengths):
        bias[row, :, :, length:longest] = MASKED
    return Batch(past, lengths[:, None] + np.arange(tokens), bias)
