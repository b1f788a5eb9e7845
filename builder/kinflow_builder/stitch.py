"""Stitching: a family out of members that were trained apart, of different widths and depths.

The device runs the smallest one as it is; at the split a projection is added to its graph, as a further output.
A server restores the hidden values from the decoded features, continues the smallest member from there, maps the
same values by an adapter onto a larger member's, continues that one too, and answers with both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from kinflow_builder.adapter import Adapter
from kinflow_builder.transform import Transform
from kinflow_builder.trunk import Segment, Trunk


@dataclass(frozen=True)
class Pretrained:
    """A trained network, cut in two where its hidden values are to be shared. Both halves in evaluation mode."""

    below: nn.Module
    """Preprocessed images -> hidden values [n, channels, height, width]."""
    above: nn.Module
    """Hidden values -> logits [n, classes]."""


class Continued(nn.Module):  # type: ignore[misc]
    """A server's member: decoded features -> logits, which are log probabilities here.

    The two answers are combined as a weighted geometric mean of their probabilities (Hinton, Products of experts,
    Neural Computation 2002): members that were trained apart make different mistakes.
    """

    def __init__(self, restore: nn.Module, small: nn.Module, adapter: Adapter, large: nn.Module, share: float) -> None:
        super().__init__()
        self.restore = restore
        self.small = small
        self.adapter = adapter
        self.large = large
        self.share = share
        """Weight of the larger member's answer, 0 to 1."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        small, large = self.answers(features)
        return combined(small, large, self.share)

    def answers(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the smallest member and of the larger one."""
        hidden = self.restore(features)
        return self.small(hidden), self.large(self.adapter(hidden))


def combined(small: torch.Tensor, large: torch.Tensor, share: float) -> torch.Tensor:
    """Unnormalised log probabilities of both answers together."""
    return (1 - share) * functional.log_softmax(small, 1) + share * functional.log_softmax(large, 1)


def stitched_trunk(
    names: list[str], split: str, device: Pretrained, transform: Transform, step: float, servers: list[Continued]
) -> Trunk:
    """`names`: of the members, which their segments and exits have too; the servers all begin at `split`."""
    first, *others = names
    segments = [
        Segment(
            first,
            device.below,
            split=split,
            bottleneck=transform.bottleneck(step),
            exit=first,
            branch=device.above,
        )
    ]
    for name, server in zip(others, servers, strict=True):
        segments.append(Segment(name, nn.Identity(), source=split, exit=name, branch=server))
    trunk = Trunk(segments)
    trunk.eval()
    return trunk
