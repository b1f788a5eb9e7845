"""From a recipe to a bundle: train, export, fit codecs, calibrate, certify, measure, write the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from kinflow import idx
from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow.manifest import Manifest
from kinflow_builder import bundle, card, figures, measure
from kinflow_builder.align import aligned
from kinflow_builder.assemble import assemble, reassemble
from kinflow_builder.exits import calibrated_exits, describe
from kinflow_builder.folders import Division, Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.precision import settled
from kinflow_builder.recipe import IdxData, Recipe
from kinflow_builder.stitch_recipe import AnyRecipe
from kinflow_builder.trunk import Trunk

# Enough for tables and mean sizes to settle.
CODEC_IMAGES = 5000
# Of images held for that, as float32.
CODEC_BYTES = 1 << 29


@dataclass(frozen=True)
class Build:
    """What one run works on."""

    folder: Path
    """The recipe's."""
    out: Path
    """The bundle's folder."""
    work: Path
    """Gets the checkpoint."""
    recipe: AnyRecipe
    images: Division
    log: BuildLog


def build_family(build: Build, *, fresh: bool) -> figures.Figures:
    """Builds the bundle; the figures are those on the card.

    Raises SettingsError for the recipe, BackendError for a graph that computes something else than torch,
    BundleError for a bundle that does not hold together.
    """
    recipe, images = build.recipe, build.images
    torch.set_num_threads(recipe.training.threads)
    torch.manual_seed(recipe.training.seed)
    trunk = aligned(build, fresh=fresh)
    if isinstance(recipe, Recipe):
        recipe = settled(recipe, trunk, images.train, images.held_out, build.log)
    return _finished(build, partial(assemble, recipe=recipe, trunk=trunk, log=build.log))


def rebuild(build: Build) -> figures.Figures:
    """The bundle that is there, with the codecs, exits and certificates that the recipe asks for now: trains nothing.

    Raises as `build_family` does, and BundleError where there is no bundle.
    """
    old = Family.load(build.out)
    return _finished(build, partial(reassemble, recipe=build.recipe, old=old, log=build.log))


def _finished(build: Build, write: Callable[[Path, measure.Array, measure.Array], Manifest]) -> figures.Figures:
    """The bundle, replaced when it is whole. `write` puts graphs and codecs into a folder, which it fits to images."""
    seen = [_some(part, build.recipe) for part in (build.images.train, build.images.held_out)]
    with bundle.staged(build.out) as stage:
        found = certify_and_measure(stage, write(stage, *seen), build)
    build.log.line(f"bundle: {bundle.size_bytes(build.out)} bytes")
    return found


def certify_and_measure(stage: Path, manifest: Manifest, build: Build) -> figures.Figures:
    """All that follows graphs and codecs: `stage` holds what `manifest` names and gets exits, figures and the card."""
    recipe, log, images = build.recipe, build.log, build.images
    family = bundle.write_manifest(stage, manifest)
    runs = measure.run_coded(family, images.held_out.batches(recipe.preprocess))
    exits = calibrated_exits(manifest.exits, runs, images.held_out.truth, recipe.exits, images.held_out.sha256())
    for name, exit in exits.items():
        log.line(f"exit {name}: {describe(exit)}")
    family = bundle.write_manifest(stage, msgspec.structs.replace(manifest, exits=exits))
    found = figures.measure_all(family, images.test, log)
    exits = {name: msgspec.structs.replace(exit, accuracy=found.coded[name]) for name, exit in exits.items()}
    manifest = msgspec.structs.replace(manifest, exits=exits)
    card.write(stage, manifest, recipe, found)
    bundle.write_manifest(stage, manifest)
    return found


def check_names(recipe: AnyRecipe, trunk: Trunk) -> None:
    """Raises SettingsError where the recipe names segments, splits or exits that the trunk does not have."""
    segments = {segment.name for segment in trunk.segments}
    splits, exits = set(trunk.bottlenecks), set(trunk.exits)
    rows = [
        ("coding", set(recipe.coding), splits, True),
        ("exits", set(recipe.exits), exits, False),
        ("tflite_segments", set(recipe.tflite_segments), segments, False),
        ("precision", set(recipe.precision), segments, False),
        ("float_layers", set(recipe.float_layers), segments, False),
    ]
    if isinstance(recipe, Recipe):
        rows.append(("training.exit_weights", set(recipe.training.exit_weights), exits, True))
    rows += [(f"members.{member}", set(parts), segments, False) for member, parts in recipe.members.items()]
    for field, given, known, complete in rows:
        if given - known or (complete and known - given):
            raise SettingsError(f"{field} names {sorted(given)}, the network has {sorted(known)}")


def write_samples(folder: Path, test: Pictures, recipe: AnyRecipe) -> None:
    """The first test images, in the format and under the names that an idx data set itself has."""
    if isinstance(recipe.data, IdxData):
        folder.mkdir(parents=True, exist_ok=True)
        part = test.part(np.arange(min(recipe.data.samples, len(test))))
        idx.write(folder / "images-idx3-ubyte.gz", np.stack([image for image, _ in part.read(recipe.preprocess)]))
        idx.write(folder / "labels-idx1-ubyte.gz", part.truth.astype("uint8"))


def _some(pictures: Pictures, recipe: AnyRecipe) -> measure.Array:
    """Preprocessed images to fit codecs to: float32 [n, channels, height, width]; the first ones give int8's ranges."""
    spec = recipe.preprocess
    limit = CODEC_BYTES // (4 * len(spec.mean) * spec.height * spec.width)
    return np.concatenate(list(pictures.spread(min(CODEC_IMAGES, limit)).batches(spec)))
