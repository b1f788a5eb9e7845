"""From a plain model and a recipe's [nested] to a trained trunk: the whole alone, factors, all members together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import nested
from kinflow_builder.blocks import blocks_of, last_of
from kinflow_builder.factors import factorise
from kinflow_builder.log import BuildLog
from kinflow_builder.nested import Ranks
from kinflow_builder.nested_trunk import NestedTrunk, nested_trunk
from kinflow_builder.recipe import Nested, Recipe
from kinflow_builder.train import Inputs, train
from kinflow_builder.trunk import Segment, Trunk

# Of the training images: enough for the second moments of what enters a layer.
CALIBRATION_IMAGES = 2000
CALIBRATION_BATCH = 100


@dataclass(frozen=True)
class Cutting:
    """A factored model and where it is cut."""

    model: nn.Sequential
    blocks: int
    """Before the split."""
    members: dict[str, Ranks]
    """Smallest first."""


def train_nested(
    recipe: Recipe, network: nn.Module, data: Inputs, held_out: Inputs, work: Path, log: BuildLog, *, fresh: bool
) -> tuple[NestedTrunk, Cutting]:
    """Trained, in evaluation mode. Resumes as `train` does. Raises SettingsError where recipe and network differ."""
    chosen = _nested(recipe)
    example = data.batch(slice(0, 1)).cpu()
    blocks = blocks_of(network, example)
    after = last_of(blocks, chosen.after) + 1
    if after == len(blocks):
        raise SettingsError(f"nested.after names {chosen.after!r}, the model's last block: nothing is left behind it")
    whole = nn.Sequential(*(block.module for block in blocks))
    last = list(recipe.members)[-1]
    train_alone(whole, recipe, last, chosen.epochs, data, held_out, work / "whole", log, fresh=fresh)
    cutting = Cutting(_factored(whole, data, chosen.keep), after, {})
    cutting.members.update(_members(cutting.model, recipe))
    for name, ranks in cutting.members.items():
        size = nested.parameters(nested.cut(cutting.model, ranks))
        log.line(f"{name}: {size:,.0f} parameters, ranks {' '.join(map(str, ranks.values()))}")
    torch.manual_seed(recipe.training.seed)
    (split,) = recipe.coding
    trunk = nested_trunk(cutting.model, after, cutting.members, example, chosen.channels, split)
    trained = train(trunk, recipe, data, held_out, work, log, fresh=fresh, append=True)
    assert isinstance(trained, NestedTrunk)  # train gives back what it was given
    return trained, cutting


def train_alone(
    model: nn.Sequential,
    recipe: Recipe,
    exit: str,
    epochs: int,
    data: Inputs,
    held_out: Inputs,
    work: Path,
    log: BuildLog,
    *,
    fresh: bool,
) -> None:
    """Train a model that sends nothing and has one exit, with the recipe's settings but for the epochs; in place."""
    training = msgspec.structs.replace(recipe.training, epochs=epochs)
    trunk = Trunk([Segment(exit, model[:-1], exit=exit, branch=model[-1])])
    train(trunk, msgspec.structs.replace(recipe, training=training), data, held_out, work, log, fresh=fresh)


def _nested(recipe: Recipe) -> Nested:
    """Raises SettingsError where the rest of the recipe cannot go with it."""
    chosen = recipe.nested
    assert chosen is not None  # whoever calls has looked
    *smaller, last = recipe.members
    if set(chosen.sizes) != set(smaller):
        raise SettingsError(f"nested.sizes names {sorted(chosen.sizes)}: all members but {last!r}, that is {smaller}")
    if len(recipe.coding) != 1:
        raise SettingsError(f"coding names {sorted(recipe.coding)}: a nested family has one split")
    return chosen


def _factored(whole: nn.Sequential, data: Inputs, keep: list[str]) -> nn.Sequential:
    count = min(len(data), CALIBRATION_IMAGES)
    starts = range(0, count, CALIBRATION_BATCH)
    batches = (data.batch(slice(begin, min(begin + CALIBRATION_BATCH, count))).cpu() for begin in starts)
    model = factorise(whole.cpu(), batches, keep)
    assert isinstance(model, nn.Sequential)  # factorise copies
    return model


def _members(model: nn.Sequential, recipe: Recipe) -> dict[str, Ranks]:
    sizes = _nested(recipe).sizes
    whole = nested.parameters(nested.cut(model, nested.full(model)))
    return {
        name: nested.fit(model, sizes[name] * whole) if name in sizes else nested.full(model) for name in recipe.members
    }
