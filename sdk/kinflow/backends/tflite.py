"""TFLite: `tflite-runtime` where it is installed (CPython <= 3.11, numpy 1), otherwise `ai-edge-litert`."""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.errors import BackendError
from kinflow.manifest import Graph

Array = npt.NDArray[np.float32]


def interpreter_module() -> Any:
    """The module with `Interpreter`. Raises BackendError when neither runtime can be used."""
    numpy_major = int(np.__version__.partition(".")[0])
    # tflite-runtime imports under numpy 2 and dies when an Interpreter is made.
    if find_spec("tflite_runtime") is not None and numpy_major < 2:
        return import_module("tflite_runtime.interpreter")
    if find_spec("ai_edge_litert") is not None:
        return import_module("ai_edge_litert.interpreter")
    if find_spec("tflite_runtime") is not None:
        raise BackendError(f"tflite-runtime needs numpy < 2, this is {np.__version__}: pip install 'numpy<2'")
    raise BackendError("no TFLite runtime is installed: pip install 'kinflow[tflite]'")


class TfliteRunner:
    """One Interpreter: static shapes, batch 1, so a batch runs item by item. A lock makes it safe to share."""

    def __init__(self, data: bytes, graph: Graph, threads: int) -> None:
        module = interpreter_module()
        try:
            self._interpreter = module.Interpreter(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as exc:
            raise BackendError(f"{graph.file.path}: {module.__name__} refuses it: {exc}") from exc
        inputs = self._interpreter.get_input_details()
        outputs = self._interpreter.get_output_details()
        found = [tuple(detail["shape"]) for detail in (*inputs, *outputs)]
        expected = [(1, *tensor.shape) for tensor in (graph.input, *graph.outputs)]
        if found != expected:
            raise BackendError(f"{graph.file.path} has the shapes {found}, the manifest says {expected}")
        self._input = inputs[0]["index"]
        self._outputs = [detail["index"] for detail in outputs]
        self._path = graph.file.path
        self._lock = threading.Lock()

    def run(self, batch: Array) -> list[Array]:
        with self._lock:
            items = [self._run_one(batch[i : i + 1]) for i in range(len(batch))]
        if len(items) == 1:
            return items[0]
        return [np.concatenate(parts) for parts in zip(*items, strict=True)]

    def _run_one(self, item: Array) -> list[Array]:
        try:
            self._interpreter.set_tensor(self._input, item)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as exc:
            raise BackendError(f"{self._path}: {exc}") from exc
        return [self._interpreter.get_tensor(index) for index in self._outputs]
