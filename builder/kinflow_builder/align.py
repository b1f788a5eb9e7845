"""However a family is aligned, what comes out is a trained Trunk; the recipe says by which way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder.align_nested import train_nested
from kinflow_builder.blocks import blocks_of
from kinflow_builder.branches import trunk_of
from kinflow_builder.recipe import Recipe
from kinflow_builder.stitch_recipe import StitchRecipe
from kinflow_builder.stitched import stitched
from kinflow_builder.train import Inputs, train
from kinflow_builder.trunk import Trunk, make_network

if TYPE_CHECKING:
    from kinflow_builder.build import Build


def aligned(build: Build, *, fresh: bool) -> Trunk:
    """Trained, in evaluation mode. Raises SettingsError where recipe and network do not fit."""
    from kinflow_builder.build import check_names

    recipe = build.recipe
    if isinstance(recipe, StitchRecipe):
        trunk = stitched(build, recipe, fresh=fresh)
        check_names(recipe, trunk)
        return trunk
    network = make_network(build.folder, recipe.network)
    training, held_out = (Inputs.read(part, recipe.preprocess) for part in (build.images.train, build.images.held_out))
    if recipe.nested is not None:
        prefixes, _ = train_nested(recipe, network, training, held_out, build.work, build.log, fresh=fresh)
        check_names(recipe, prefixes)
        return prefixes.shipped()
    teacher = network if recipe.branches is not None and recipe.branches.teacher else None
    trunk = trunk_from(recipe, network)
    check_names(recipe, trunk)
    return train(trunk, recipe, training, held_out, build.work, build.log, fresh=fresh, teacher=teacher)


def trunk_from(recipe: Recipe, network: nn.Module) -> Trunk:
    """The network itself, or a model cut as `branches` says."""
    if isinstance(network, Trunk):
        return network
    if recipe.branches is None:
        raise SettingsError(
            f"{recipe.network.make} returns {type(network).__name__}: expected a Trunk, or [branches] in the recipe"
        )
    spec = recipe.preprocess
    example = torch.zeros(1, len(spec.mean), spec.height, spec.width)
    blocks = blocks_of(network, example)
    chosen = recipe.branches
    return trunk_of(blocks, example, chosen.after, list(recipe.members), chosen.channels, frozen=chosen.frozen)
