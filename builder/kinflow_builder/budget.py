"""How long a member takes on this machine: a measure to cut nested members by."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from torch import nn

from kinflow_builder.log import hushed

WARM_RUNS = 10
TIMED_RUNS = 100


def onnx_latency_s(example: torch.Tensor) -> Callable[[nn.Module], float]:
    """A measure for `nested.fit`: median seconds of `example` in ONNX Runtime on one thread."""

    def measure(model: nn.Module) -> float:
        with TemporaryDirectory() as folder, hushed():
            path = Path(folder) / "member.onnx"
            program = torch.onnx.export(model.eval(), (example,), dynamo=True, verbose=False)
            program.save(str(path))
            return _median_s(path, example.numpy())

    return measure


def _median_s(path: Path, example: np.ndarray) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: example}
    times = []
    for run in range(WARM_RUNS + TIMED_RUNS):
        begin = time.perf_counter()
        session.run(None, given)
        if run >= WARM_RUNS:
            times.append(time.perf_counter() - begin)
    return float(np.median(times))
