"""Runtimes that execute a segment's graph: one adapter file per foreign library."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kinflow.manifest import BackendName, Graph

Array = npt.NDArray[np.float32]


class Runner(Protocol):
    """An opened graph."""

    def run(self, batch: Array) -> list[Array]:
        """Outputs in the manifest's order, float32, batch axis first. Raises BackendError."""


def open_graph(backend: BackendName, data: bytes, graph: Graph, threads: int) -> Runner:
    """Open verified bytes. Raises BackendError when the runtime is missing or refuses the graph."""
    if backend == "onnx":
        from kinflow.backends.onnx import OnnxRunner

        return OnnxRunner(data, graph, threads)
    from kinflow.backends.tflite import TfliteRunner

    return TfliteRunner(data, graph, threads)
