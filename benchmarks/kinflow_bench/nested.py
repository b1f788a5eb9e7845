"""`bench nested`: every prefix of a nested family beside a model of its size that was trained alone."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import data, nested
from kinflow_builder.align_nested import Cutting, train_alone, train_nested
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.nested_trunk import NestedTrunk
from kinflow_builder.recipe import Recipe
from kinflow_builder.train import Inputs
from kinflow_builder.trunk import Trunk, make_network


def run(folder: Path, directory: Path | None, folds: int, only: int | None, jobs: int = 1) -> dict[str, Any]:
    """Trains everything `folds` times, each time tested on another part of all images of the recipe in `folder`.

    `only`: one fold, counted from 0, so that several machines can share the work. `jobs`: folds at the same time, each
    in a process of its own.
    """
    recipe = Recipe.load(folder)
    if recipe.nested is None:
        raise SettingsError(f"{folder}: bench nested takes a family with [nested] in its recipe")
    chosen = range(folds) if only is None else (only,)
    if jobs > 1 and len(chosen) > 1:
        # Spawned: a fork would copy torch's threads in whatever state they are.
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(_one_of, [(folder, directory, folds, fold) for fold in chosen]))
    else:
        rows = [_one_of((folder, directory, folds, fold)) for fold in chosen]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    images = int(mean.pop("images"))
    differences = {name: mean[f"{name}_served"] - mean[f"{name}_alone"] for name in recipe.members}
    return {
        "ratio": min(differences.values()),
        "served_less_alone": differences,
        **mean,
        "images_per_fold": images,
        "epochs_alone": recipe.nested.epochs + recipe.training.epochs,
        "folds": rows,
    }


def _one_of(chosen: tuple[Path, Path | None, int, int]) -> dict[str, Any]:
    """One fold's figures, from (folder, directory, folds, fold)."""
    folder, directory, folds, fold = chosen
    recipe = Recipe.load(folder)
    torch.set_num_threads(recipe.training.threads)
    division = data.load(recipe, folder, directory)
    pictures = _joined(division.train, division.held_out, division.test)
    order = np.random.default_rng(recipe.training.seed).permutation(len(pictures))
    tested = np.arange(len(order)) % folds == fold
    parts = (pictures.part(order[~tested]), pictures.part(order[tested]))
    training, test = (Inputs.read(part, recipe.preprocess) for part in parts)
    seeded = msgspec.structs.replace(recipe.training, seed=recipe.training.seed + fold)
    found = _fold(folder, msgspec.structs.replace(recipe, training=seeded), training, test)
    return {**found, "images": len(order) // folds}


def _fold(folder: Path, recipe: Recipe, training: Inputs, test: Inputs) -> dict[str, Any]:
    """Top-1 in percent of every member: as served, by itself, and of its size trained alone."""
    assert recipe.nested is not None  # run has looked
    found: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        log = BuildLog(work / "train.log")
        torch.manual_seed(recipe.training.seed)
        begin = time.monotonic()
        network = make_network(folder, recipe.network)
        trunk, cutting = train_nested(recipe, network, training, test, work / "family", log, fresh=True)
        found["family_s"] = time.monotonic() - begin
        found |= _family_figures(trunk, recipe, test)
        for name, ranks in cutting.members.items():
            begin = time.monotonic()
            alone = _from_scratch(cutting, name, recipe.training.seed)
            found[f"{name}_parameters"] = nested.parameters(alone)
            epochs = recipe.nested.epochs + recipe.training.epochs
            train_alone(alone, recipe, name, epochs, training, test, work / name, log, fresh=True)
            found[f"{name}_alone"] = _top1(alone, test)
            found[f"{name}_ranks"] = float(np.mean(list(ranks.values())))
            found["alone_s"] = time.monotonic() - begin
    return found


def _family_figures(trunk: NestedTrunk, recipe: Recipe, test: Inputs) -> dict[str, float]:
    images = test.batch(slice(None))
    (coding,) = recipe.coding.values()
    with torch.no_grad():
        # As in service: by the default codec's steps.
        passed = Trunk.forward(trunk.eval(), images, torch.full((len(test),), coding.default))
        found = {f"{name}_served": _share(logits, test) for name, logits in passed.logits.items()}
        first, *larger = trunk.segments
        (features,) = passed.features.values()
        found["feature_bytes"] = float(first.bottleneck.rate_bytes(features))
        for segment in larger:
            (uncoded,) = segment(features)
            found[f"{segment.name}_uncoded"] = _share(uncoded, test)
            found[f"{segment.name}_own"] = _share(trunk.own_logits(segment, images), test)
    return found


def _from_scratch(cutting: Cutting, name: str, seed: int) -> nn.Sequential:
    """The member's architecture with fresh weights."""
    model = nested.cut(cutting.model, cutting.members[name])
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert isinstance(model, nn.Sequential)  # cut copies
    return model


def _top1(model: nn.Module, test: Inputs) -> float:
    model.eval()
    with torch.no_grad():
        return _share(model(test.batch(slice(None))), test)


def _share(logits: torch.Tensor, test: Inputs) -> float:
    return 100 * float((logits.argmax(1) == test.labels).float().mean())


def _joined(*parts: Pictures) -> Pictures:
    items = np.concatenate([part.items for part in parts])
    return Pictures(items, np.concatenate([part.truth for part in parts]), parts[0].classes)
