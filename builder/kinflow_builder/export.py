"""One segment -> one ONNX graph, compared with torch before it may ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from kinflow.errors import BackendError
from kinflow_builder.log import hushed
from kinflow_builder.trunk import Segment

Array = npt.NDArray[np.float32]

OPSET = 18
# Float32 arithmetic in another order; with weights of 16 bits (11 of them significant) a hundredth.
TOLERANCE = 1e-4
TOLERANCE_HALF = 2e-2
# Smaller tensors (biases) are not worth a Cast node.
MIN_HALF_VALUES = 256


def export_onnx(segment: Segment, path: Path, example: Array, *, half: bool) -> float:
    """Writes `path` for any batch size; `example` is a real input of a few items.

    `half`: weights are stored as float16 and cast back by the graph; onnxruntime does it once, at load.
    Returns the largest difference to torch. Raises BackendError when it is too large.
    """
    batch = torch.export.Dim("batch")
    with hushed():
        program = torch.onnx.export(
            segment,
            (torch.from_numpy(example),),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["x"],
            output_names=segment.output_names,
            dynamic_shapes={"x": {0: batch}},
            verbose=False,
        )
    program.save(str(path))
    _strip(path)
    difference = largest_difference(torch_outputs(segment, example), _run(path, example))
    refuse_beyond(TOLERANCE, difference, path)
    if half:
        _store_half(path)
        difference = largest_difference(torch_outputs(segment, example), _run(path, example))
        refuse_beyond(TOLERANCE_HALF, difference, path)
    return difference


def torch_outputs(segment: nn.Module, example: Array) -> list[Array]:
    with torch.no_grad():
        return [output.numpy() for output in segment(torch.from_numpy(example))]


def largest_difference(expected: list[Array], found: list[Array]) -> float:
    """Over all outputs, relative to the larger of 1 and each output's spread."""
    differences = [float(np.abs(a - b).max() / max(1.0, float(a.std()))) for a, b in zip(expected, found, strict=True)]
    return max(differences)


def refuse_beyond(tolerance: float, difference: float, path: Path) -> None:
    """Raises BackendError when a graph does not compute what torch does."""
    # Written this way round so that NaN is refused too.
    if not difference <= tolerance:
        raise BackendError(f"{path.name} differs from torch by {difference:.2g}, at most {tolerance:.2g} is right")


def _run(path: Path, example: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    # A batch size that the exporter has not seen: the batch axis must really be free.
    parts = [session.run(None, {"x": part}) for part in (example[:1], example[1:])]
    return [np.concatenate(pair) for pair in zip(*parts, strict=True)]


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
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    # What the exporter noted about the initializers' types is no longer so.
    halves = {cast.output[0] for cast in casts}
    notes = [note for note in graph.value_info if note.name not in halves]
    del graph.value_info[:]
    graph.value_info.extend(notes)
    onnx.checker.check_model(model)
    onnx.save(model, path)
