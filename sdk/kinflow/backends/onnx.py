"""ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from kinflow.errors import BackendError
from kinflow.manifest import Graph

Array = npt.NDArray[np.float32]


class OnnxRunner:
    """One InferenceSession on the CPU. Safe to call from several threads."""

    def __init__(self, data: bytes, graph: Graph, threads: int) -> None:
        if find_spec("onnxruntime") is None:
            raise BackendError("ONNX Runtime is not installed: pip install 'kinflow[onnx]'")
        try:
            import onnxruntime
        except ImportError as exc:  # a wheel for another processor; also Ctrl-C while it loads
            raise BackendError(f"ONNX Runtime is installed but does not load: {exc}: see `kinflow doctor`") from exc

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads would take the core that the network thread needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's errors share no base class of their own
            raise BackendError(f"{graph.file.path}: ONNX Runtime {onnxruntime.__version__} refuses it: {exc}") from exc
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        if inputs != [graph.input.name] or outputs != [output.name for output in graph.outputs]:
            raise BackendError(
                f"{graph.file.path} has the inputs {inputs} and outputs {outputs}; the manifest names others"
            )
        self._input = graph.input.name
        self._path = graph.file.path

    def run(self, batch: Array) -> list[Array]:
        try:
            # None: all outputs, in the graph's order, which is the manifest's.
            return list(self._session.run(None, {self._input: batch}))
        except Exception as exc:
            raise BackendError(f"{self._path}: {exc}") from exc
