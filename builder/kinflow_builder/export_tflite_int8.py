"""A float TFLite graph -> a static int8 one, with float inputs and outputs, so that it is run like any other."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kinflow.errors import BackendError
from kinflow_builder.log import hushed


def quantise_tflite(path: Path, inputs: npt.NDArray[np.float32]) -> None:
    """Rewrites the graph at `path`; `inputs` [n, …] are real preprocessed items, a hundred or so.

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
        for item in inputs:
            run(**{given: item[None]})
        quantiser = Quantizer(str(path))
        quantiser.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
        for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            quantiser.update_quantization_recipe(".*", edge, algorithm_key=AlgorithmName.NO_QUANTIZE)
        quantised = quantiser.quantize(calibrator.get_calibration_results()).quantized_model
    path.write_bytes(bytes(quantised))
