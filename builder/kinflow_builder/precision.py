"""`precision = "auto"`: 8 bits where every exit answers nearly as well with them, else floats. Measured, not guessed.

The device's graphs are quantised and run on the held-out pictures; the larger members then read what *they* send.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch

from kinflow.errors import BackendError
from kinflow.manifest import BackendName, Precision, Preprocess
from kinflow_builder.assemble import BATCH, EXAMPLES, RANGE_INPUTS, Run
from kinflow_builder.export import export_onnx, runner, torch_outputs
from kinflow_builder.export_int8 import Rounding
from kinflow_builder.export_tflite import export_tflite, tflite_runner
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Recipe, Wanted
from kinflow_builder.trunk import Segment, Trunk

# What 8 bits may cost any exit, as a share of the pictures: less than a certificate's epsilon usually is.
MAX_LOSS = 0.005


def settled(recipe: Recipe, trunk: Trunk, train: Pictures, held_out: Pictures, log: BuildLog) -> Recipe:
    """The recipe with a precision in place of "auto". `train`: gives the ranges; `held_out`: decides."""
    first = trunk.segments[0]
    auto = [name for name, precision in recipe.precision.items() if precision == "auto"]
    if not auto:
        return recipe
    # Servers have room for floats, and nothing that quantises their inputs' ranges is known here.
    chosen: dict[str, Wanted] = dict.fromkeys(auto, "float")
    if first.name in auto:
        ranges = next(train.spread(RANGE_INPUTS).batches(recipe.preprocess, RANGE_INPUTS))
        rounding = Rounding(ranges, recipe.float_layers.get(first.name, 0))

        def right(run: Run) -> dict[str, float]:
            return _right(trunk, run, held_out, recipe.preprocess)

        chosen[first.name] = _decide(first, rounding, right, log, tflite=first.name in recipe.tflite_segments)
    return msgspec.structs.replace(recipe, precision={**recipe.precision, **chosen})


def _decide(
    first: Segment,
    rounding: Rounding,
    right: Callable[[Run], dict[str, float]],
    log: BuildLog,
    *,
    tflite: bool,
) -> Precision:
    """int8 where every graph that is to be made stands it: a device may run any of them."""
    before = right(partial(torch_outputs, first))
    example = rounding.ranges[:EXAMPLES]
    after: dict[BackendName, dict[str, float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / first.name
            export_onnx(first, path, example, "int8", rounding)
            after["onnx"] = right(runner(path))
            if tflite:
                export_tflite(first, path, example, rounding)
                after["tflite"] = right(tflite_runner(path))
    except BackendError as exc:
        log.line(f"{first.name}: stays in floats: {exc}")
        return "float"
    lost = max(before[exit] - found[exit] for found in after.values() for exit in before)
    decided: Precision = "int8" if lost <= MAX_LOSS else "float"
    for backend, found in after.items():
        figures = ", ".join(f"{exit} {100 * before[exit]:.2f} -> {100 * found[exit]:.2f}" for exit in before)
        log.line(f"{first.name} in 8 bits by {backend}: held-out top-1 {figures}")
    log.line(f"{first.name}: {decided}, 8 bits may lose {100 * MAX_LOSS:g} points")
    return decided


def _right(trunk: Trunk, run: Run, pictures: Pictures, preprocess: Preprocess) -> dict[str, float]:
    """Top-1 share of each exit where the first segment is the graph that `run` runs, all else as it was trained."""
    right = dict.fromkeys(trunk.exits, 0)
    labels = torch.from_numpy(pictures.truth)
    begin = 0
    for batch in pictures.batches(preprocess, BATCH):
        truth = labels[begin : begin + len(batch)]
        for exit, logits in trunk.continued([torch.from_numpy(output) for output in run(batch)]).items():
            right[exit] += int((logits.argmax(1) == truth).sum())
        begin += len(batch)
    return {exit: count / len(pictures) for exit, count in right.items()}
