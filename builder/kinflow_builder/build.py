"""From a recipe to a bundle: train, export, fit codecs, calibrate, certify, measure, write the card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from kinflow import idx
from kinflow.errors import SettingsError
from kinflow_builder import bundle, card, figures, measure
from kinflow_builder.assemble import assemble
from kinflow_builder.data import DataSet, LabelledImages, preprocess
from kinflow_builder.exits import calibrated_exits, describe
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Data, Recipe
from kinflow_builder.train import Inputs, train
from kinflow_builder.trunk import Trunk, make_trunk

# Enough for tables and mean sizes to settle.
CODEC_IMAGES = 5000


@dataclass(frozen=True)
class Build:
    """What one run works on."""

    folder: Path
    """The recipe's."""
    out: Path
    """Gets bundle/, samples/, and work/ with the checkpoint; the recipe's folder or another."""
    recipe: Recipe
    images: DataSet
    log: BuildLog

    def inputs(self, part: LabelledImages) -> Inputs:
        return Inputs(preprocess(part.images, self.recipe.preprocess), part.labels)


def run(build: Build, *, fresh: bool) -> figures.Figures:
    """Builds the bundle and the samples beside it; the figures are those on the card.

    Raises SettingsError for the recipe, BackendError for a graph that computes something else than torch,
    BundleError for a bundle that does not hold together.
    """
    recipe, log = build.recipe, build.log
    torch.set_num_threads(recipe.training.threads)
    torch.manual_seed(recipe.training.seed)
    trunk = make_trunk(build.folder, recipe.network)
    check_names(recipe, trunk)
    training, held_out = map(build.inputs, (build.images.train, build.images.held_out))
    trunk = train(trunk, recipe, training, held_out, build.out / "work", log, fresh=fresh)
    with bundle.staged(build.out / "bundle") as stage:
        manifest = assemble(stage, recipe, trunk, training.images[:CODEC_IMAGES], held_out.images, log)
        family = bundle.write_manifest(stage, manifest)
        runs = measure.run_coded(family, measure.in_batches(held_out.images))
        exits = calibrated_exits(manifest.exits, runs, held_out.labels, recipe.exits, build.images.held_out.sha256())
        for name, exit in exits.items():
            log.line(f"exit {name}: {describe(exit)}")
        manifest = msgspec.structs.replace(manifest, exits=exits)
        family = bundle.write_manifest(stage, manifest)
        found = figures.measure_all(family, Pictures(*build.images.test, recipe.labels), log)
        exits = {name: msgspec.structs.replace(exit, accuracy=found.coded[name]) for name, exit in exits.items()}
        manifest = msgspec.structs.replace(manifest, exits=exits)
        card.write(stage, manifest, recipe, found)
        bundle.write_manifest(stage, manifest)
    write_samples(build.out / "samples", build.images.test, recipe.data)
    log.line(f"bundle: {bundle.size_bytes(build.out / 'bundle')} bytes")
    return found


def check_names(recipe: Recipe, trunk: Trunk) -> None:
    """Raises SettingsError where the recipe names segments, splits or exits that the trunk does not have."""
    segments = {segment.name for segment in trunk.segments}
    splits, exits = set(trunk.bottlenecks), set(trunk.exits)
    rows = [
        ("coding", set(recipe.coding), splits, True),
        ("training.exit_weights", set(recipe.training.exit_weights), exits, True),
        ("exits", set(recipe.exits), exits, False),
        ("tflite_segments", set(recipe.tflite_segments), segments, False),
        ("half_segments", set(recipe.half_segments), segments, False),
    ]
    rows += [(f"members.{member}", set(parts), segments, False) for member, parts in recipe.members.items()]
    for field, given, known, complete in rows:
        if given - known or (complete and known - given):
            raise SettingsError(f"{field} names {sorted(given)}, the network has {sorted(known)}")


def write_samples(folder: Path, test: LabelledImages, spec: Data) -> None:
    """The first test images, in the format and under the names that the data set itself has."""
    folder.mkdir(parents=True, exist_ok=True)
    part = test.part(slice(0, spec.samples))
    idx.write(folder / "images-idx3-ubyte.gz", part.images)
    idx.write(folder / "labels-idx1-ubyte.gz", part.labels.astype("uint8"))
