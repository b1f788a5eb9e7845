"""One segment -> one TFLite graph for a single item, compared with torch before it may ship."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from kinflow.backends.tflite import interpreter_module
from kinflow.errors import BackendError
from kinflow_builder.export import (
    TOLERANCE,
    TOLERANCES,
    Array,
    largest_difference,
    mean_difference,
    refuse_beyond,
    torch_outputs,
)
from kinflow_builder.export_int8 import Rounding
from kinflow_builder.export_tflite_int8 import quantise_tflite
from kinflow_builder.log import hushed
from kinflow_builder.trunk import Segment


def export_tflite(segment: Segment, path: Path, example: Array, rounding: Rounding | None = None) -> float:
    """Writes `path`, a static graph of batch 1. Returns the largest difference to torch over `example`.

    `rounding`: of a static int8 graph, whose inputs and outputs stay float; the difference then is the root mean
    square one. Raises BackendError when the converter is missing or cannot take the segment, or when the graph
    computes something else.
    """
    if find_spec("litert_torch") is None:
        raise BackendError("the TFLite converter is not installed: pip install 'kinflow[builder-tflite]'")
    with hushed():
        import litert_torch

        try:
            litert_torch.convert(segment.eval(), (torch.from_numpy(example[:1]),)).export(str(path))
        except Exception as exc:  # whatever its many passes raise for a layer that they do not know
            reason = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise BackendError(
                f"the TFLite converter cannot take the segment {segment.name!r} ({reason}): take it out of "
                "`tflite_segments` in the recipe and build again; what is trained is kept"
            ) from exc
    expected = torch_outputs(segment, example)
    difference = largest_difference(expected, tflite_runner(path)(example))
    refuse_beyond(TOLERANCE, difference, path)
    if rounding is not None:
        quantise_tflite(path, rounding)
        difference = mean_difference(expected, tflite_runner(path)(example))
        refuse_beyond(TOLERANCES["int8"], difference, path)
    return difference


def tflite_runner(path: Path) -> Callable[[Array], list[Array]]:
    """Batch -> all outputs of the graph, in its own order, item by item and by one thread."""
    interpreter = interpreter_module().Interpreter(model_content=path.read_bytes(), num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def run(batch: Array) -> list[Array]:
        rows = []
        for item in batch:
            interpreter.set_tensor(source, item[None])
            interpreter.invoke()
            rows.append([interpreter.get_tensor(index) for index in outputs])
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    return run
