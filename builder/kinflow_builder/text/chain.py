"""Runs a bundle's graphs one behind another, with caches: to measure what ships. No service, no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def open_graph(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """One graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass
class Part:
    """One segment and the caches of a batch of texts, all of the same length."""

    session: onnxruntime.InferenceSession
    past: Floats | None = field(default=None, init=False)

    def run(self, values: npt.NDArray[np.generic]) -> Floats:
        """ids [B,T] or hidden [B,T,d] of the next T positions -> hidden [B,T,d]"""
        first, cache = self.session.get_inputs()[:2]
        batch, tokens = values.shape[:2]
        past = self.past
        if past is None:
            past = np.zeros((batch, 0, *cache.shape[2:]), np.float32)
        before = past.shape[1]
        positions = np.tile(np.arange(before, before + tokens), (batch, 1))
        bias = np.tile(np.triu(np.full((tokens, before + tokens), -1e9, np.float32), before + 1), (batch, 1, 1, 1))
        inputs = {first.name: values, "past": past, "positions": positions, "bias": bias}
        result, present = self.session.run(None, inputs)
        self.past = np.concatenate([past, present], 1)
        return np.asarray(result)

    def forget(self) -> None:
        """The next texts begin anew."""
        self.past = None
