"""Runs a bundle's graphs one behind another, with caches: to measure what ships. No service, no network."""

from __future__ import annotations

from collections.abc import Iterable
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
    past: dict[str, Floats] = field(default_factory=dict, init=False)
    """By input: all that the graph keeps."""
    length: int = field(default=0, init=False)

    def run(self, values: npt.NDArray[np.generic]) -> Floats:
        """ids [B,T] or hidden [B,T,d] of the next T positions -> hidden [B,T,d]"""
        batch, tokens = values.shape[:2]
        inputs = {node.name: node for node in self.session.get_inputs()}
        first = self.session.get_inputs()[0].name
        before, after = self.length, self.length + tokens
        given = {first: values, **(self.past or _empty(inputs.values(), batch))}
        if "past" in inputs:
            given["positions"] = np.tile(np.arange(before, after), (batch, 1))
            bias = np.triu(np.full((tokens, after), -1e9, np.float32), before + 1)
            given["bias"] = np.tile(bias, (batch, 1, 1, 1))
        else:
            given |= {"last": np.full(batch, after - 1, np.int32), "total": np.array([after], np.int32)}
        result, *kept = self.session.run(None, given)
        if "past" in inputs:
            self.past = {"past": np.concatenate([given["past"], kept[0]], 1)}
        else:
            names = [node.name for node in self.session.get_outputs()[1:]]
            self.past = {f"{name}.past": values for name, values in zip(names, kept, strict=True)}
        self.length = after
        return np.asarray(result)

    def forget(self) -> None:
        """The next texts begin anew."""
        self.past, self.length = {}, 0


def _empty(inputs: Iterable[onnxruntime.NodeArg], batch: int) -> dict[str, Floats]:
    """The past of texts that begin. Its axes are free where texts and positions are counted."""
    sizes = {"batch": batch, "before": 0}
    return {
        node.name: np.zeros([sizes.get(axis, axis) for axis in node.shape], np.float32)
        for node in inputs
        if node.name.endswith("past")
    }
