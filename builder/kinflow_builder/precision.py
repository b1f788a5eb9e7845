"""`precision = "auto"`: 8 bits where every exit answers nearly as well with them, else floats. Measured, not guessed.

The device's graph is quantised and run on the held-out pictures; the larger members then read what *it* sends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from kinflow.errors import BackendError
from kinflow.manifest import Precision, Preprocess
from kinflow_builder.export import Array, runner, write_graph
from kinflow_builder.export_int8 import quantise_onnx
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Recipe, Wanted
from kinflow_builder.trunk import Segment, Trunk

# What 8 bits may cost any exit, as a share of the pictures: less than a certificate's epsilon usually is.
MAX_LOSS = 0.005
RANGE_INPUTS = 128
BATCH = 50


def settled(recipe: Recipe, trunk: Trunk, train: Pictures, held_out: Pictures, log: BuildLog) -> Recipe:
    """The recipe with a precision in place of "auto". `train`: gives the ranges; `held_out`: decides."""
    first = trunk.segments[0]
    auto = [name for name, precision in recipe.precision.items() if precision == "auto"]
    if not auto:
        return recipe
    # Servers have room for floats, and nothing that quantises their inputs' ranges is known here.
    chosen: dict[str, Wanted] = dict.fromkeys(auto, "float")
    if first.name in auto:
        ranges = next(_spread(train, RANGE_INPUTS).batches(recipe.preprocess, RANGE_INPUTS))

        def right(run: Callable[[Array], list[Array]]) -> dict[str, float]:
            return _right(trunk, run, held_out, recipe.preprocess)

        chosen[first.name] = _decide(first, ranges, right, log)
    return msgspec.structs.replace(recipe, precision={**recipe.precision, **chosen})


def _decide(
    first: Segment, ranges: Array, right: Callable[[Callable[[Array], list[Array]]], dict[str, float]], log: BuildLog
) -> Precision:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{first.name}.onnx"
        write_graph(first, path, ranges[:2])
        before = right(runner(path))
        try:
            quantise_onnx(path, ranges)
        except BackendError as exc:
            log.line(f"{first.name}: stays in floats: {exc}")
            return "float"
        after = right(runner(path))
    decided: Precision = "int8" if all(after[exit] >= before[exit] - MAX_LOSS for exit in before) else "float"
    figures = ", ".join(f"{exit} {100 * before[exit]:.2f} -> {100 * after[exit]:.2f}" for exit in before)
    log.line(f"{first.name} in 8 bits: held-out top-1 {figures}: {decided}, {100 * MAX_LOSS:g} points may be lost")
    return decided


def _right(
    trunk: Trunk, run: Callable[[Array], list[Array]], pictures: Pictures, preprocess: Preprocess
) -> dict[str, float]:
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


def _spread(pictures: Pictures, count: int) -> Pictures:
    """Evenly over all: files come class by class."""
    return pictures.part(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).astype(np.intp))
