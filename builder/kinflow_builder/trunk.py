"""The shape every network of a recipe has: ordered segments that end at a split, carry an exit, or both.

However a family's members are aligned (a shared trunk with branches, stitching, nested low rank), what comes out
is a Trunk: the first segment takes the input, each later one the features of a split before it.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder.quantiser import Bottleneck
from kinflow_builder.recipe import Network


class Segment(nn.Module):  # type: ignore[misc]
    """Consecutive layers; `split` and `bottleneck` come together, and so do `exit` and `branch`.

    `source`: the split whose features it takes; without it, the one at which the segment before ends.
    """

    def __init__(
        self,
        name: str,
        layers: nn.Module,
        *,
        source: str | None = None,
        split: str | None = None,
        bottleneck: Bottleneck | None = None,
        exit: str | None = None,
        branch: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (split is None) != (bottleneck is None) or (exit is None) != (branch is None):
            raise ValueError(f"segment {name!r}: a split needs a bottleneck, an exit needs a branch")
        if split is None and exit is None:
            raise ValueError(f"segment {name!r} ends nowhere: give it a split, an exit, or both")
        self.name = name
        self.source = source
        self.split = split
        self.exit = exit
        self.layers = layers
        self.bottleneck = bottleneck
        self.branch = branch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(features, logits), without the one that this segment does not have."""
        hidden = self.layers(x)
        outputs = () if self.bottleneck is None else (self.bottleneck(hidden),)
        return outputs if self.branch is None else (*outputs, self.branch(hidden))

    @property
    def output_names(self) -> list[str]:
        return ["features"] * (self.split is not None) + ["logits"] * (self.exit is not None)


@dataclass(frozen=True)
class Pass:
    """One training pass: logits per exit, features per split, as they stand before quantisation."""

    logits: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]


class Trunk(nn.Module):  # type: ignore[misc]
    """All segments: the first takes the input, each later one the quantised features of a split before it."""

    def __init__(self, segments: list[Segment]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        known: set[str | None] = {None}
        for before, segment in itertools.pairwise(segments):
            known.add(before.split)
            segment.source = segment.source or before.split
            if segment.source is None or segment.source not in known:
                raise ValueError(
                    f"segment {segment.name!r} begins at {segment.source!r}, no segment before it ends there"
                )
        if segments[-1].split is not None or segments[-1].exit is None:
            raise ValueError(f"the last segment, {segments[-1].name!r}, needs an exit and no split")

    def forward(self, x: torch.Tensor, coarseness: torch.Tensor | None = None) -> Pass:
        """`coarseness`: float32 [n], each item's steps in trained ones; 0: its features pass as they are."""
        return self._passed(self.segments[0](x), coarseness)

    def continued(self, outputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Logits per exit, from what something else computed in the first segment's place."""
        with torch.no_grad():
            return self._passed(outputs, None).logits

    def _passed(self, outputs: Sequence[torch.Tensor], coarseness: torch.Tensor | None) -> Pass:
        """`outputs`: the first segment's."""
        logits: dict[str, torch.Tensor] = {}
        features: dict[str, torch.Tensor] = {}
        sources: dict[str, torch.Tensor] = {}
        for segment in self.segments:
            given = outputs if segment is self.segments[0] else segment(sources[segment.source])
            named = dict(zip(segment.output_names, given, strict=True))
            if segment.exit is not None:
                logits[segment.exit] = named["logits"]
            if segment.split is not None:
                kept = features[segment.split] = named["features"]
                sources[segment.split] = segment.bottleneck.quantise(kept, coarseness)
        return Pass(logits, features)

    @property
    def exits(self) -> list[str]:
        """First to last."""
        return [segment.exit for segment in self.segments if segment.exit is not None]

    @property
    def head_weights(self) -> list[torch.Tensor]:
        """The weight of each exit's last linear layer."""
        branches = [segment.branch for segment in self.segments if segment.branch is not None]
        linear = [[layer for layer in branch.modules() if isinstance(layer, nn.Linear)] for branch in branches]
        return [layers[-1].weight for layers in linear if layers]

    @property
    def bottlenecks(self) -> dict[str, Bottleneck]:
        return {segment.split: segment.bottleneck for segment in self.segments if segment.split is not None}


def make_network(folder: Path, network: Network) -> nn.Module:
    """What `network.make` of the recipe in `folder` returns: a Trunk, or a model that is cut into one.

    Raises SettingsError that names it otherwise.
    """
    make = function_of(folder, network.make, "network.make")
    try:
        made = make(**network.options)
    except (TypeError, ValueError) as exc:
        raise SettingsError(f"network.make = {network.make!r} with {network.options}: {exc}") from exc
    if isinstance(made, (list, tuple)) and all(isinstance(part, nn.Module) for part in made):
        return nn.Sequential(*made)
    if not isinstance(made, nn.Module):
        raise SettingsError(
            f"{network.make} returns {type(made).__name__}, expected a torch.nn.Module, or a list of them"
        )
    return made


def function_of(folder: Path, named: str, field: str) -> Callable[..., Any]:
    """The function `file.py:function`, the file relative to `folder`. Raises SettingsError that names `field`."""
    file, _, function = named.rpartition(":")
    path = folder / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SettingsError(f"{field} names {path}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Its own neighbours can be imported from there, as when it is run.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        raise SettingsError(f"{path} cannot be imported: {type(exc).__name__}: {exc}") from exc
    finally:
        sys.path.remove(str(path.parent.resolve()))
    make: Callable[..., Any] | None = getattr(module, function, None)
    if make is None:
        raise SettingsError(f"{field} names {function!r}, which {path} does not define")
    return make
