"""`bench local`: what `infer()` adds to a graph whose answer stays on the device."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from kinflow.device import Device
from kinflow.family import Family
from kinflow.preprocess import Preprocessor
from kinflow.settings import DeviceSettings
from kinflow_bench import synthetic
from kinflow_bench.timing import interleaved, mean_ms, spread

TARGET_MS = 10.0


def run(bundle: Path, rounds: int) -> dict[str, Any]:
    """Ratios for the family's device member and for a made graph of about 10 ms."""
    with tempfile.TemporaryDirectory() as folder:
        ten = synthetic.write(Path(folder) / "ten", _shape_of(TARGET_MS, Path(folder)))
        family, made = _compare(bundle, rounds), _compare(ten, rounds)
    return {
        "ratio": family["ratio"],
        "ratio_10ms": made["ratio"],
        "device_member": family,
        "graph_10ms": made,
    }


def _compare(bundle: Path, rounds: int) -> dict[str, Any]:
    family = Family.load(bundle)
    side = family.preprocess.height, family.preprocess.width
    shape = side if family.preprocess.mode == "L" else (*side, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    prepare = Preprocessor(family.preprocess)
    graph = family.manifest.segments[family.manifest.members["device"].segments[0]].graphs["onnx"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(family.files[graph.file.path], options, providers=["CPUExecutionProvider"])

    # threshold 0 keeps every answer: what is measured is the path of a confident one, offloading switched on.
    settings = DeviceSettings(threshold=0.0, broker="127.0.0.1:9")
    with Device(family, settings) as device:
        calls = max(5, int(200 / mean_ms(lambda: device.infer(image), 20)))
        figures = interleaved(
            {
                "infer": lambda: mean_ms(lambda: device.infer(image), calls),
                "bare": lambda: mean_ms(lambda: session.run(None, {graph.input.name: prepare(image)}), calls),
            },
            rounds,
        )
    ratios = [a / b for a, b in zip(figures["infer"], figures["bare"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "infer_ms": spread(figures["infer"]),
        "bare_ms": spread(figures["bare"]),
        "calls_per_run": calls,
    }


def _shape_of(target_ms: float, folder: Path) -> synthetic.Shape:
    """Layers until the device graph takes about `target_ms` on this machine."""
    shape = synthetic.Shape(side=32, layers=8, width=64)
    member = Family.load(synthetic.write(folder / "probe", shape)).member("device")
    batch = np.zeros((1, 1, shape.side, shape.side), np.float32)
    mean_ms(lambda: member.run(batch), 5)
    spent_ms = mean_ms(lambda: member.run(batch), 20)
    return synthetic.Shape(side=32, layers=max(1, round(shape.layers * target_ms / spent_ms)), width=64)
