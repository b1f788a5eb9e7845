"""One segment -> one ONNX graph, compared with torch before it may ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from kinflow.backends.onnx import EXACT_INT8
from kinflow.errors import BackendError
from kinflow.manifest import Precision
from kinflow_builder.export_int8 import Rounding, quantise_onnx
from kinflow_builder.log import hushed
from kinflow_builder.trunk import Segment
from kinflow_builder.weights import save_with, store_weights

Array = npt.NDArray[np.float32]

OPSET = 18
# Float32 arithmetic in another order; with weights of 16 bits (11 of them significant) a hundredth.
TOLERANCE = 1e-4
TOLERANCE_HALF = 2e-2
# Of the root mean square: 8 or 6 bits for each weight, or 8 for each value of every layer.
TOLERANCES: dict[Precision, float] = {"half": TOLERANCE_HALF, "weights8": 0.1, "weights6": 0.3, "int8": 0.3}
# Smaller tensors (biases) are not worth a Cast node.
MIN_HALF_VALUES = 256


def export_onnx(
    segment: Segment, path: Path, example: Array, precision: Precision = "float", rounding: Rounding | None = None
) -> float:
    """Writes `path` for any batch size; `example` is a real input of a few items.

    `precision` half, weights8 or weights6: how weights are stored; the graph computes with floats, and onnxruntime
    turns them back once, at load. int8: activations too, as `rounding` says.
    Returns the largest difference to torch, of int8 the root mean square one. Raises BackendError when it is too
    large.
    """
    write_graph(segment, path, example)
    expected = torch_outputs(segment, example)
    difference = largest_difference(expected, _run(path, example))
    refuse_beyond(TOLERANCE, difference, path)
    if precision == "half":
        _store_half(path)
    elif precision in ("weights8", "weights6"):
        store_weights(path, 8 if precision == "weights8" else 6)
    elif precision == "int8":
        if rounding is None:
            raise ValueError(f"{path.name}: int8 needs inputs to take ranges from")
        quantise_onnx(path, rounding)
    else:
        return difference
    found = _run(path, example)
    difference = largest_difference(expected, found) if precision == "half" else mean_difference(expected, found)
    refuse_beyond(TOLERANCES[precision], difference, path)
    return difference


def write_graph(module: nn.Module, path: Path, example: Array) -> None:
    """A float graph of `module`, which names its outputs in `output_names`."""
    batch = torch.export.Dim("batch")
    with hushed():
        program = torch.onnx.export(
            module,
            (torch.from_numpy(example),),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["x"],
            output_names=list(module.output_names),
            dynamic_shapes={"x": {0: batch}},
            verbose=False,
        )
    program.save(str(path))
    _strip(path)


def runner(path: Path) -> Callable[[Array], list[Array]]:
    """Batch -> all outputs of the graph, in its own order, computed by one thread."""
    session = _session(path, threads=1)
    return lambda batch: list(session.run(None, {"x": batch}))


def torch_outputs(segment: nn.Module, example: Array) -> list[Array]:
    with torch.no_grad():
        return [output.numpy() for output in segment(torch.from_numpy(example))]


def largest_difference(expected: list[Array], found: list[Array]) -> float:
    """Over all outputs, relative to the larger of 1 and each output's spread."""
    differences = [float(np.abs(a - b).max() / max(1.0, float(a.std()))) for a, b in zip(expected, found, strict=True)]
    return max(differences)


def mean_difference(expected: list[Array], found: list[Array]) -> float:
    """The largest of all outputs' root mean square differences, each in units of the output's spread."""
    return max(
        float(np.sqrt(np.square(a - b).mean()) / max(1e-6, float(a.std())))
        for a, b in zip(expected, found, strict=True)
    )


def refuse_beyond(tolerance: float, difference: float, path: Path) -> None:
    """Raises BackendError when a graph does not compute what torch does."""
    # Written this way round so that NaN is refused too.
    if not difference <= tolerance:
        raise BackendError(f"{path.name} differs from torch by {difference:.2g}, at most {tolerance:.2g} is right")


def _run(path: Path, example: Array) -> list[Array]:
    session = _session(path, threads=0)
    # A batch size that the exporter has not seen: the batch axis must really be free.
    parts = [session.run(None, {"x": part}) for part in (example[:1], example[1:])]
    return [np.concatenate(pair) for pair in zip(*parts, strict=True)]


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry(*EXACT_INT8)
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def _strip(path: Path) -> None:
    """Removes the exporter's notes: each node carries the source lines, and with them folders, of the exporter."""
    model = onnx.load(path)
    for noted in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        noted.doc_string = ""
        del noted.metadata_props[:]
    onnx.save(model, path)


def _store_half(path: Path) -> None:
    model = onnx.load(path)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < MIN_HALF_VALUES:
            continue
        name, stored = tensor.name, f"{tensor.name}.half"
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    save_with(model, casts, path)
