"""Runs what has been picked as one batch per segment, whatever each session's length and way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kinflow.text.segment import SegmentRunner
from kinflow_edge.text.job import Feed
from kinflow_edge.text.model import Array, ServedText


def run(model: ServedText, feeds: Sequence[Feed], most: int) -> None:
    """Advance each feed by up to `most` positions. Raises BackendError; the caches are then in between, crop them."""
    at: list[npt.NDArray[np.generic]] = [feed.next(most) for feed in feeds]
    for name, segment in model.segments.items():
        rows = [row for row, feed in enumerate(feeds) if name in feed.path]
        if rows:
            outputs = _together(segment, [at[row] for row in rows], [feeds[row] for row in rows])
            for row, output in zip(rows, outputs, strict=True):
                at[row] = output
    for feed, output in zip(feeds, at, strict=True):
        feed.advance(np.asarray(output, np.float32))


def _together(
    segment: SegmentRunner, inputs: Sequence[npt.NDArray[np.generic]], feeds: Sequence[Feed]
) -> list[npt.NDArray[np.generic]]:
    counts = [len(rows) for rows in inputs]
    padded = np.zeros((len(inputs), max(counts), *inputs[0].shape[1:]), inputs[0].dtype)
    for row, values in enumerate(inputs):
        padded[row, : len(values)] = values
    outputs = segment.run(padded, [feed.caches[segment.name] for feed in feeds], counts)
    return [output[:count] for output, count in zip(outputs, counts, strict=True)]


def logits(model: ServedText, normed: Sequence[Array]) -> list[Array]:
    """The head on all of them at once: each [n, width] -> [n, vocabulary]."""
    counts = np.cumsum([len(rows) for rows in normed])[:-1]
    return list(np.split(model.head.run(np.concatenate(normed)), counts))
