"""Way three of aligning: a family of prefixes as a trunk, with shared factors that all members train together.

The device has the model's layers at its own ranks; each larger member takes over at the split, with the remaining
layers at larger ranks.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import nested
from kinflow_builder.branches import around
from kinflow_builder.nested import Ranks
from kinflow_builder.trunk import Pass, Segment, Trunk


class NestedTrunk(Trunk):
    """Trains all members at once: what they share learns from every member that has it.

    A larger member's segment is fed in two ways, item by item: with the device's quantised features, as in
    service, and with those that its own lower layers, at its own ranks, would send. It has to understand both, and
    that keeps the prefixes' hidden features aligned. The larger members' lower layers serve training alone.
    """

    def __init__(self, segments: list[Segment], lower: dict[str, nn.Module]) -> None:
        super().__init__(segments)
        self.lower = nn.ModuleDict(lower)

    def forward(self, x: torch.Tensor, coarseness: torch.Tensor | None = None) -> Pass:
        """`coarseness`: float32 [n], each item's steps in trained ones; 0: each member's own features as they are."""
        if coarseness is None:
            return super().forward(x)
        first, *larger = self.segments
        hidden = [first.layers(x), *(self.lower[segment.name](x) for segment in larger)]
        # As one batch: the normalisation in the bottleneck then is the same for all of them.
        kept, *own = first.bottleneck(torch.cat(hidden)).chunk(len(hidden))
        coded = first.bottleneck.quantise(kept, coarseness)
        logits = {first.exit: first.branch(hidden[0])}
        alone = (coarseness == 0).view(-1, 1, 1, 1)
        for segment, features in zip(larger, own, strict=True):
            (logits[segment.exit],) = segment(torch.where(alone, features.float(), coded))
        return Pass(logits, {first.split: kept})

    def own_logits(self, segment: Segment, x: torch.Tensor) -> torch.Tensor:
        """Of a larger member that runs by itself: its own lower layers, nothing quantised."""
        (logits,) = segment(self.segments[0].bottleneck(self.lower[segment.name](x)))
        return logits

    def shipped(self) -> Trunk:
        """The same function of ordinary layers, without what serves training alone."""
        parts = [
            Segment(
                segment.name,
                nested.plain(segment.layers),
                source=segment.source,
                split=segment.split,
                bottleneck=copy.deepcopy(segment.bottleneck),
                exit=segment.exit,
                branch=nested.plain(segment.branch),
            )
            for segment in self.segments
        ]
        trunk = Trunk(parts)
        trunk.train(self.training)
        return trunk


def nested_trunk(
    model: nn.Sequential, blocks: int, members: dict[str, Ranks], example: torch.Tensor, channels: int, split: str
) -> NestedTrunk:
    """`model`: factored, its blocks in order; after `blocks` of them is the split, with features of `channels`.

    `members`: their ranks, smallest first; segments and exits get their names. `example`: an input of one item.
    Raises SettingsError unless each member is at least as large as the one before, in every layer.
    """
    for (small, less), (large, more) in itertools.pairwise(members.items()):
        shrunk = [layer for layer, rank in less.items() if rank > more.get(layer, 0)]
        if shrunk:
            raise SettingsError(f"member {large!r} is smaller than {small!r} in the layers {', '.join(shrunk)}")
    with torch.no_grad():
        hidden = model.eval()[:blocks](example)
    bottleneck, restore = around(hidden, channels)
    prefixes = {name: nested.prefix(model, ranks) for name, ranks in members.items()}
    first, *larger = members
    lower = {name: prefix[:blocks] for name, prefix in prefixes.items()}
    upper = {name: prefix[blocks:] for name, prefix in prefixes.items()}
    device = Segment(first, lower[first], split=split, bottleneck=bottleneck, exit=first, branch=upper[first])
    rest = [
        Segment(name, copy.deepcopy(nn.Sequential(*restore)), source=split, exit=name, branch=upper[name])
        for name in larger
    ]
    return NestedTrunk([device, *rest], {name: lower[name] for name in larger})
