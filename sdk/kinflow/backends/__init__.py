"""Runtimes that execute a segment's graph: one adapter file per foreign library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from kinflow.manifest import BackendName, Graph

Array = npt.NDArray[np.float32]
Accelerator = Literal["cpu", "cuda", "tensorrt", "auto"]


@dataclass(frozen=True)
class Acceleration:
    """Where ONNX Runtime computes."""

    kind: Accelerator = "cpu"
    """`auto`: TensorRT, else CUDA, else the CPU, by what is there."""
    engine_cache: str = ""
    """Folder for TensorRT's engines; empty: they are built anew each time."""


ON_CPU = Acceleration()


class Runner(Protocol):
    """An opened graph."""

    def run(self, batch: Array) -> list[Array]:
        """Outputs in the manifest's order, float32, batch axis first. Raises BackendError."""


def open_graph(
    backend: BackendName, data: bytes, graph: Graph, threads: int, acceleration: Acceleration = ON_CPU
) -> Runner:
    """Open verified bytes. Raises BackendError when the runtime is missing or refuses the graph."""
    if backend == "onnx":
        from kinflow.backends.onnx import OnnxRunner

        return OnnxRunner(data, graph, threads, acceleration)
    from kinflow.backends.tflite import TfliteRunner

    return TfliteRunner(data, graph, threads)
