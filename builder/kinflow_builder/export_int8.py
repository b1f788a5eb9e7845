"""A float ONNX graph -> a static int8 one: for the device, whose processor is several times faster with it.

Activations are 8-bit unsigned, weights 8-bit signed with a scale per output channel, ranges come from real
inputs (U8S8 in QuantizeLinear/DequantizeLinear pairs, which onnxruntime fuses). Inputs and outputs stay float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from kinflow.errors import BackendError
from kinflow_builder.log import hushed

Array = npt.NDArray[np.float32]

CALIBRATION_BATCH = 4


def quantise_onnx(path: Path, inputs: Array) -> None:
    """Rewrites the float graph at `path`; `inputs` [n, …] are real preprocessed items, a hundred or so.

    Features come out in 256 levels over their whole range, some sixteen to a step of the codec. Raises
    BackendError when the graph has no layer to quantise.
    """
    with tempfile.TemporaryDirectory() as folder, hushed():
        folded = Path(folder) / "folded.onnx"
        quant_pre_process(str(path), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(path),
            _Reader(inputs),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )
    if not any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node):
        raise BackendError(f"{path.name}: no layer of the graph could be quantised, leave its precision at float")


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
