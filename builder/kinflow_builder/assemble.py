"""A trained trunk -> graph files, codec tables and the manifest that names them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from kinflow import manifest as spec
from kinflow.codec import UniformCodec
from kinflow.errors import SettingsError
from kinflow.family import INPUT, Family
from kinflow.tokens import FeatureCodec
from kinflow_builder import bundle, codecs
from kinflow_builder.cost import cost
from kinflow_builder.export import Array, export_onnx, runner
from kinflow_builder.export_int8 import Rounding
from kinflow_builder.export_tflite import export_tflite
from kinflow_builder.log import BuildLog
from kinflow_builder.measure import median_s
from kinflow_builder.recipe import Coding
from kinflow_builder.stitch_recipe import AnyRecipe
from kinflow_builder.trunk import Segment, Trunk

EXAMPLES = 16
# From which the ranges of an int8 graph are taken.
RANGE_INPUTS = 128
BATCH = 50

Run = Callable[[Array], list[Array]]


def assemble(
    stage: Path, fitting: Array, measured: Array, recipe: AnyRecipe, trunk: Trunk, log: BuildLog
) -> spec.Manifest:
    """Writes the files into `stage`. Exits keep everything so far: they are calibrated through these graphs.

    `fitting` and `measured` are preprocessed images: the codecs' tables come from the first, their mean sizes
    from the second; both go through the graphs themselves. Raises BackendError when a graph does not compute
    what torch does.
    """
    segments: dict[str, spec.Segment] = {}
    splits: dict[str, spec.Split] = {}
    seen = {INPUT: (fitting, measured)}
    for segment in trunk.segments:
        source = segment.source or INPUT
        segments[segment.name] = _segment(stage, recipe, segment, source, seen[source][0], log)
        if segment.split is not None:
            run, step = runner(stage / f"{segment.name}.onnx"), segment.bottleneck.step
            fitted = _split(stage, recipe, segment.split, step, run, seen[source], log)
            splits[segment.split], seen[segment.split] = fitted
    return spec.Manifest(
        schema=1,
        id=recipe.id,
        version=recipe.version,
        task="image-classification",
        title=recipe.title,
        license=recipe.license,
        labels=recipe.labels,
        preprocess=recipe.preprocess,
        splits=splits,
        segments=segments,
        exits={name: spec.Exit(temperature=1.0, threshold=0.0, accuracy=0.0) for name in trunk.exits},
        members={name: spec.Member(parts) for name, parts in recipe.members.items()},
    )


def reassemble(
    stage: Path, fitting: Array, measured: Array, recipe: AnyRecipe, old: Family, log: BuildLog
) -> spec.Manifest:
    """As `assemble`, with the graphs of the bundle `old`: codecs are fitted again as the recipe says now.

    Raises SettingsError where its splits are not the recipe's.
    """
    before = old.manifest
    segments: dict[str, spec.Segment] = {}
    if set(before.splits) != set(recipe.coding):
        raise SettingsError(f"coding names {sorted(recipe.coding)}, the bundle has the splits {sorted(before.splits)}")
    splits: dict[str, spec.Split] = {}
    seen = {INPUT: (fitting, measured)}
    for name, segment in before.segments.items():
        graphs: dict[spec.BackendName, spec.Graph] = {}
        for backend, graph in segment.graphs.items():
            (stage / graph.file.path).write_bytes(old.files[graph.file.path])
            stated = graph.precision or _precision(recipe, name, backend)
            graphs[backend] = msgspec.structs.replace(graph, precision=stated)
        segments[name] = msgspec.structs.replace(segment, graphs=graphs)
        if segment.split is not None:
            run = runner(stage / segment.graphs["onnx"].file.path)
            step = before.splits[segment.split].codecs[f"{segment.split}-q4"].step[0]
            fitted = _split(stage, recipe, segment.split, step, run, seen[segment.source], log)
            splits[segment.split], seen[segment.split] = fitted
        log.line(f"{name}: its graphs are kept")
    exits = {name: spec.Exit(temperature=1.0, threshold=0.0, accuracy=0.0) for name in before.exits}
    return msgspec.structs.replace(before, segments=segments, splits=splits, exits=exits)


def _split(
    stage: Path, recipe: AnyRecipe, split: str, step: float, run: Run, seen: tuple[Array, Array], log: BuildLog
) -> tuple[spec.Split, tuple[Array, Array]]:
    """The split behind the graph `run`, which reads `seen`; and what the segments that begin there see in service:
    features as the default codec gives them back."""
    fitting, measured = (_features(run, part) for part in seen)
    made, default = _fit(stage, split, step, recipe.coding[split], fitting, measured, log)
    return made, (default.dequantise(default.quantise(fitting)), default.dequantise(default.quantise(measured)))


def _features(run: Run, inputs: Array) -> Array:
    """Features before quantisation, of all items: a graph's first output."""
    return np.concatenate([run(inputs[begin : begin + BATCH])[0] for begin in range(0, len(inputs), BATCH)])


def _precision(recipe: AnyRecipe, segment: str, backend: spec.BackendName) -> spec.Precision | None:
    """Of the graph that is made for `backend`; None where "auto" is not decided yet."""
    wanted = recipe.precision.get(segment, "float")
    if wanted == "auto":
        return None
    # Of weights alone TFLite's have no smaller form.
    return wanted if backend == "onnx" or wanted == "int8" else "float"


def _segment(
    stage: Path, recipe: AnyRecipe, segment: Segment, source: str, inputs: Array, log: BuildLog
) -> spec.Segment:
    example = np.ascontiguousarray(inputs[:EXAMPLES])
    with torch.no_grad():
        shapes = [list(output.shape[1:]) for output in segment(torch.from_numpy(example))]
    outputs = [spec.Tensor(name, shape) for name, shape in zip(segment.output_names, shapes, strict=True)]
    given = spec.Tensor("x", list(example.shape[1:]))
    graphs: dict[spec.BackendName, spec.Graph] = {}

    path = stage / f"{segment.name}.onnx"
    precision = _precision(recipe, segment.name, "onnx")
    assert precision is not None  # precision.settled has decided
    rounding = Rounding(inputs[:RANGE_INPUTS], recipe.float_layers.get(segment.name, 0))
    difference = export_onnx(segment, path, example, precision, rounding)
    graphs["onnx"] = spec.Graph(bundle.describe(stage, path.name), given, outputs, True, precision)
    log.line(f"{path.name}: {path.stat().st_size} bytes, difference to torch {difference:.1e}")
    if segment.name in recipe.tflite_segments:
        path = stage / f"{segment.name}.tflite"
        stored = _precision(recipe, segment.name, "tflite")
        difference = export_tflite(segment, path, example, rounding if stored == "int8" else None)
        graphs["tflite"] = spec.Graph(bundle.describe(stage, path.name), given, outputs, False, stored)
        log.line(f"{path.name}: {path.stat().st_size} bytes, difference to torch {difference:.1e}")

    spent = cost(segment, torch.from_numpy(example[:1]))
    return spec.Segment(source, segment.split, segment.exit, graphs, spent.macs, spent.parameters)


def _fit(
    stage: Path, split: str, step: float, coding: Coding, fitting: Array, measured: Array, log: BuildLog
) -> tuple[spec.Split, UniformCodec]:
    """All codecs of a split, and the one that is used when none is named. `step` is what training quantised with."""
    made = [codecs.fit(f"{split}-q4", fitting, measured, step, 4, coding.context)]
    for rate in coding.rates:
        made.append(codecs.fit(f"{split}-q4x{rate:g}", fitting, measured, step * rate, 4, coding.context))
    # Four bits more, the same range; a table of each position's 256 levels would be larger than what it saves.
    made.append(codecs.fit(f"{split}-q8", fitting, measured, step / 16, 8))
    merging = [
        codecs.fit_merging(f"{split}-m{merge.clusters}", fitting, measured, step, merge.clusters, merge.neighbours)
        for merge in coding.merging
    ]
    every: list[codecs.FittedCodec[FeatureCodec]] = [*made, *merging]
    for fitted in every:
        assert fitted.spec.table is not None  # fit makes range coders
        (stage / fitted.spec.table.path).write_bytes(fitted.table)
        encode_ms = 1e3 * median_s(partial(fitted.codec.encode, measured[0]))
        log.line(f"{fitted.codec.name}: {fitted.spec.bytes_mean:.1f} bytes per item, encoded in {encode_ms:.2f} ms")
    specs = {fitted.codec.name: fitted.spec for fitted in every}
    default = made[[1.0, *coding.rates].index(coding.default)].codec
    return spec.Split(list(fitting.shape[1:]), specs, default.name), default
