"""A float ONNX graph -> a static int8 one: for the device, whose processor is several times faster with it.

Activations are 8-bit unsigned, weights 8-bit signed with a scale per output channel, ranges come from real
inputs (U8S8 in QuantizeLinear/DequantizeLinear pairs, which onnxruntime fuses). Inputs and outputs stay float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from kinflow.errors import BackendError
from kinflow_builder.log import hushed

Array = npt.NDArray[np.float32]

CALIBRATION_BATCH = 4
# Nodes that `float_layers` counts: those with weights.
LAYERS = ("Conv", "Gemm", "MatMul")


class Rounding(NamedTuple):
    """What a graph in 8 bits is made with."""

    ranges: Array
    """Real preprocessed items [n, …], a hundred or so: what they make of each layer is the range of its values."""
    float_layers: int = 0
    """So many of the first layers stay floats: all others build upon what those round."""


def quantise_onnx(path: Path, rounding: Rounding) -> None:
    """Rewrites the float graph at `path`.

    Features come out in 256 levels over their whole range, some sixteen to a step of the codec. Raises
    BackendError when the graph has no layer to quantise.
    """
    with tempfile.TemporaryDirectory() as folder, hushed():
        folded = Path(folder) / "folded.onnx"
        quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(path),
            _Reader(rounding.ranges),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=_first_layers(folded, rounding.float_layers),
        )
    if not any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node):
        raise BackendError(f"{path.name}: no layer of the graph could be quantised, leave its precision at float")


def _first_layers(path: Path, count: int) -> list[str]:
    return [node.name for node in onnx.load(path).graph.node if node.op_type in LAYERS][:count]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches, one after the other, as onnxruntime asks for them."""

    def __init__(self, inputs: Array) -> None:
        self._batches: Iterator[Array] = (
            np.ascontiguousarray(inputs[begin : begin + CALIBRATION_BATCH])
            for begin in range(0, len(inputs), CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch}
