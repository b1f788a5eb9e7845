"""ONNX Runtime."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.backends import ON_CPU, Acceleration, Accelerator
from kinflow.errors import BackendError
from kinflow.logs import event
from kinflow.manifest import Graph

Array = npt.NDArray[np.float32]
log = logging.getLogger("kinflow.backends")

PROVIDERS: dict[Accelerator, str] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
# An x86 processor with AVX2 and without VNNI adds products of int8 weights in 16 bits, which overflow, unless it is
# told to be exact: features would be others there than on any other machine.
EXACT_INT8 = ("session.x64quantprecision", "1")


def open_session(data: bytes, path: str, threads: int, wanted: Acceleration = ON_CPU) -> Any:
    """An InferenceSession; `path` names the graph in errors.

    Raises BackendError when ONNX Runtime is missing or refuses the graph.
    """
    if find_spec("onnxruntime") is None:
        raise BackendError("ONNX Runtime is not installed: pip install 'kinflow[onnx]'")
    try:
        import onnxruntime
    except ImportError as exc:  # a wheel for another processor; also Ctrl-C while it loads
        raise BackendError(f"ONNX Runtime is installed but does not load: {exc}: see `kinflow doctor`") from exc

    # For an app that imported it before kinflow, which switches telemetry off (kinflow/__init__.py).
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads would take the core that the network thread needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    providers = choose(wanted, onnxruntime.get_available_providers())
    try:
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as exc:  # onnxruntime's errors share no base class of their own
        raise BackendError(f"{path}: ONNX Runtime {onnxruntime.__version__} refuses it: {exc}") from exc


class OnnxRunner:
    """One InferenceSession. Safe to call from several threads."""

    def __init__(self, data: bytes, graph: Graph, threads: int, wanted: Acceleration = ON_CPU) -> None:
        self._session = open_session(data, graph.file.path, threads, wanted)
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        if inputs != [graph.input.name] or outputs != [output.name for output in graph.outputs]:
            raise BackendError(
                f"{graph.file.path} has the inputs {inputs} and outputs {outputs}; the manifest names others"
            )
        self.accelerator = _in_use(wanted, self._session.get_providers())
        self._input = graph.input.name
        self._path = graph.file.path

    def run(self, batch: Array) -> list[Array]:
        try:
            # None: all outputs, in the graph's order, which is the manifest's.
            return list(self._session.run(None, {self._input: batch}))
        except Exception as exc:
            raise BackendError(f"{self._path}: {exc}") from exc


def choose(wanted: Acceleration, available: list[str]) -> list[str | tuple[str, dict[str, Any]]]:
    """Providers in the order in which ONNX Runtime shall try them. Raises BackendError when one is not built in."""
    order: tuple[Accelerator, ...] = ("tensorrt", "cuda", "cpu")
    if wanted.kind == "auto":
        order = tuple(name for name in order if PROVIDERS[name] in available)
    elif PROVIDERS[wanted.kind] not in available:
        has = ", ".join(name for name in order if PROVIDERS[name] in available)
        raise BackendError(
            f"accelerator is {wanted.kind!r}, this onnxruntime has {has}: devices/jetson/README.md says which "
            "wheel brings the others"
        )
    else:
        # What the accelerator cannot compute, the next one does; without this a graph may not open at all.
        order = tuple(name for name in order[order.index(wanted.kind) :] if PROVIDERS[name] in available)
    return [_provider(name, wanted) for name in order]


def _provider(name: Accelerator, wanted: Acceleration) -> str | tuple[str, dict[str, Any]]:
    if name != "tensorrt" or not wanted.engine_cache:
        return PROVIDERS[name]
    # An engine is built for minutes, at the first run on a board; later starts load it.
    Path(wanted.engine_cache).mkdir(parents=True, exist_ok=True)
    cache = {"trt_engine_cache_enable": True, "trt_engine_cache_path": wanted.engine_cache}
    return PROVIDERS[name], cache | {"trt_timing_cache_enable": True, "trt_timing_cache_path": wanted.engine_cache}


def _in_use(wanted: Acceleration, active: list[str]) -> Accelerator:
    """ONNX Runtime goes on without a provider whose libraries do not load: say so, or refuse."""
    used = next(name for name, provider in PROVIDERS.items() if provider in active)
    if wanted.kind not in ("auto", used):
        raise BackendError(f"accelerator is {wanted.kind!r}, but it does not start here: {used} would be used")
    if wanted.kind == "auto":
        event(log, logging.INFO, "accelerator", used=used)
    return used
