"""A float TFLite graph -> a static int8 one, with float inputs and outputs, so that it is run like any other."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kinflow.backends.tflite import interpreter_module
from kinflow.errors import BackendError
from kinflow_builder.export_int8 import Rounding
from kinflow_builder.log import hushed

# Operations that `float_layers` counts: those with weights.
LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def quantise_tflite(path: Path, rounding: Rounding) -> None:
    """Rewrites the graph at `path`.

    Weights get a scale per output channel, each layer's values one scale. Raises BackendError where the quantiser
    is missing.
    """
    if find_spec("ai_edge_quantizer") is None:
        raise BackendError("the TFLite quantiser is not installed: pip install 'kinflow[builder-tflite]'")
    # It draws its own progress bars on standard error.
    with hushed(), redirect_stderr(io.StringIO()):
        from ai_edge_quantizer.calibrator import CalibrationInterpreter, CalibrationMode
        from ai_edge_quantizer.qtyping import TFLOperationName
        from ai_edge_quantizer.quantizer import Quantizer
        from ai_edge_quantizer.recipe_manager import AlgorithmName
        from ai_edge_quantizer.utils.qsv_utils import min_max_update

        # Its own way is a moving average of the ranges, which cuts off what few inputs reach: some ten times the error.
        calibrator = CalibrationInterpreter(str(path), CalibrationMode.CALIBRATION, min_max_update)
        run = calibrator.get_signature_runner()
        (given,) = run.get_input_details()
        for item in rounding.ranges:
            run(**{given: item[None]})
        quantiser = Quantizer(str(path))
        quantiser.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
        for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            quantiser.update_quantization_recipe(".*", edge, algorithm_key=AlgorithmName.NO_QUANTIZE)
        for name in _first_layers(path, rounding.float_layers):
            quantiser.update_quantization_recipe(
                f"^{re.escape(name)}", TFLOperationName.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
        quantised = quantiser.quantize(calibrator.get_calibration_results()).quantized_model
    path.write_bytes(bytes(quantised))


def _first_layers(path: Path, count: int) -> list[str]:
    """Names of what they compute, by which the quantiser knows them."""
    interpreter: Any = interpreter_module().Interpreter(model_content=path.read_bytes())
    names = {detail["index"]: detail["name"] for detail in interpreter.get_tensor_details()}
    layers = [operation for operation in interpreter._get_ops_details() if operation["op_name"] in LAYERS]
    return [names[layer["outputs"][0]] for layer in layers[:count]]
