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


def assemble(
    stage: Path, recipe: AnyRecipe, trunk: Trunk, fitting: Array, measured: Array, log: BuildLog
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
            run = runner(stage / f"{segment.name}.onnx")
            fitting, measured = (_features(run, part) for part in seen[source])
            step = segment.bottleneck.step
            fitted = _fit(stage, segment.split, step, recipe.coding[segment.split], fitting, measured, log)
            splits[segment.split], default = fitted
            # A segment that begins here sees what the codec gives back, as in service.
            seen[segment.split] = (
                default.dequantise(default.quantise(fitting)),
                default.dequantise(default.quantise(measured)),
            )
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
    stage: Path, recipe: AnyRecipe, old: Family, fitting: Array, measured: Array, log: BuildLog
) -> spec.Manifest:
    """As `assemble`, with the graphs of the bundle `old`: codecs are fitted again as the recipe says now.

    Raises SettingsError where its splits are not the recipe's.
    """
    before = old.manifest
    if set(before.splits) != set(recipe.coding):
        raise SettingsError(f"coding names {sorted(recipe.coding)}, the bundle has the splits {sorted(before.splits)}")
    splits: dict[str, spec.Split] = {}
    seen = {INPUT: (fitting, measured)}
    for name, segment in before.segments.items():
        for graph in segment.graphs.values():
            (stage / graph.file.path).write_bytes(old.files[graph.file.path])
        if segment.split is not None:
            run = runner(stage / segment.graphs["onnx"].file.path)
            fitting, measured = (_features(run, part) for part in seen[segment.source])
            step = before.splits[segment.split].codecs[f"{segment.split}-q4"].step[0]
            coding = recipe.coding[segment.split]
            splits[segment.split], default = _fit(stage, segment.split, step, coding, fitting, measured, log)
            seen[segment.split] = (
                default.dequantise(default.quantise(fitting)),
                default.dequantise(default.quantise(measured)),
            )
        log.line(f"{name}: its graphs are kept")
    exits = {name: spec.Exit(temperature=1.0, threshold=0.0, accuracy=0.0) for name in before.exits}
    return msgspec.structs.replace(before, splits=splits, exits=exits)


def _features(run: Callable[[Array], list[Array]], inputs: Array) -> Array:
    """Features before quantisation, of all items: a graph's first output."""
    return np.concatenate([run(inputs[begin : begin + BATCH])[0] for begin in range(0, len(inputs), BATCH)])


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
    precision = recipe.precision.get(segment.name, "float")
    ranges = inputs[:RANGE_INPUTS]
    difference = export_onnx(segment, path, example, precision, ranges)
    graphs["onnx"] = spec.Graph(bundle.describe(stage, path.name), given, outputs, dynamic_batch=True)
    log.line(f"{path.name}: {path.stat().st_size} bytes, difference to torch {difference:.1e}")
    if segment.name in recipe.tflite_segments:
        path = stage / f"{segment.name}.tflite"
        difference = export_tflite(segment, path, example, ranges if precision == "int8" else None)
        graphs["tflite"] = spec.Graph(bundle.describe(stage, path.name), given, outputs, dynamic_batch=False)
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
