"""A family of prefixes as a trunk: the device's part up to the split, every larger member's rest from there on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import nested
from kinflow_builder.nested import Ranks
from kinflow_builder.quantiser import Bottleneck
from kinflow_builder.trunk import Pass, Segment, Trunk


class Divided(nn.Module):  # type: ignore[misc]
    """A network in two parts: `lower` gives hidden values [n, channels, height, width], `upper` their logits.

    Of tokens, hidden values are [n, channels, tokens, 1].
    """

    def __init__(self, lower: nn.Module, upper: nn.Module) -> None:
        super().__init__()
        self.lower = lower
        self.upper = upper

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upper(self.lower(x))


@dataclass(frozen=True)
class Passage:
    """The way of the features over a split."""

    split: str
    bottleneck: Bottleneck
    restore: nn.Module
    """Features -> hidden values, at the larger member."""


class NestedTrunk(Trunk):
    """Trains all members at once, each step: shared factors learn from every member that has them.

    A larger member's rest is fed in two ways, item by item: by the device's quantised features, as in service, and
    by the features of its own lower part at its own ranks. The same rest has to understand both, which is what keeps
    the prefixes' hidden features aligned. The lower parts of larger members serve training alone.
    """

    def __init__(self, segments: list[Segment], own_lower: dict[str, nn.Module]) -> None:
        super().__init__(segments)
        self.own_lower = nn.ModuleDict(own_lower)

    def forward(self, x: torch.Tensor, unquantised: torch.Tensor | None = None) -> Pass:
        """`unquantised`: bool [n], the items whose features are each member's own; None: all are the device's."""
        first, *larger = self.segments
        kept, logits = first(x)
        coded = first.bottleneck.quantise(kept)
        answers = {first.exit: logits}
        for segment in larger:
            given = coded
            if unquantised is not None:
                given = torch.where(unquantised.view(-1, 1, 1, 1), self.own_features(segment.name, x).float(), coded)
            (answers[segment.exit],) = segment(given)
        return Pass(answers, {first.split: kept})

    def own_features(self, segment: str, x: torch.Tensor) -> torch.Tensor:
        """What the member of this segment would send itself of the images `x`, before quantisation."""
        return self.segments[0].bottleneck(self.own_lower[segment](x))

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
        return Trunk(parts).train(self.training)


def nested_trunk(model: nn.Module, members: dict[str, Ranks], passage: Passage) -> NestedTrunk:
    """`model`: a Divided one, factored. `members`: their ranks, smallest first; segments and exits get their names.

    Raises SettingsError unless every member's ranks are at least those of the member before.
    """
    names = list(members)
    for smaller, larger in zip(names, names[1:], strict=False):
        shrunk = [layer for layer, rank in members[smaller].items() if rank > members[larger].get(layer, 0)]
        if shrunk:
            raise SettingsError(f"member {larger!r} is not larger than {smaller!r} in the layers {', '.join(shrunk)}")
    prefixes = {name: nested.prefix(model, ranks) for name, ranks in members.items()}
    first, *rest = names
    segments = [
        Segment(
            first,
            prefixes[first].lower,
            split=passage.split,
            bottleneck=passage.bottleneck,
            exit=first,
            branch=prefixes[first].upper,
        )
    ]
    segments += [
        Segment(name, copy.deepcopy(passage.restore), source=passage.split, exit=name, branch=prefixes[name].upper)
        for name in rest
    ]
    return NestedTrunk(segments, {name: prefixes[name].lower for name in rest})
