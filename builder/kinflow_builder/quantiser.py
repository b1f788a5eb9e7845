"""The bottleneck at a split: a projection, and the codec's own arithmetic with gradients through it.

The 4-bit level of a value is `clip(round(value / step) + 8, 0, 15)`, as in kinflow.codec. Rounding passes the
gradient straight through (Bengio et al., arXiv 1308.3432). The rate is the code length of each channel, or of each
value of the plane where `plane` is given, taken from a running histogram of its levels and interpolated between
neighbouring ones, so that it has a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

BITS: Literal[4] = 4
LEVELS = 1 << BITS
ZERO = LEVELS // 2
HISTOGRAM_DECAY = 0.99
# No level is ever impossible: its code length stays finite, as in the codec's tables.
_FLOOR = 1.0 / 4096


class Bottleneck(nn.Module):  # type: ignore[misc]
    """Maps hidden values to a split's features, and quantises features.

    `step` is in units of the features; with it, the initial features have a spread of 1 / `step` levels.
    `plane`: height and width of the features where every position has statistics of its own, as things in the
    centre of all images have; without it a channel's positions are alike. `before`: turns hidden values of another
    layout into [n, inputs, height, width].
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        step: float,
        *,
        kernel: int = 1,
        stride: int = 1,
        padding: int = 0,
        plane: tuple[int, int] | None = None,
        before: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.before = before or nn.Identity()
        self.step = step
        self.plane = plane
        self.project = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.scale = nn.BatchNorm2d(channels)
        rows = channels * (math.prod(plane) if plane else 1)
        self.register_buffer("histogram", torch.full((rows, LEVELS), 1.0 / LEVELS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Features [n, channels, height, width] before quantisation: what the codec takes."""
        return self.scale(self.project(self.before(hidden)))

    def quantise(self, features: torch.Tensor, coarseness: torch.Tensor | None = None) -> torch.Tensor:
        """What the codec's decoder gives back; the gradient passes as if only clipped.

        `coarseness`: float32 [n], how many times wider than `step` each item's steps are; 0: no quantising.
        """
        values = features.float()
        if coarseness is None:
            return _rounded(values, self.step)
        wide = coarseness.view(-1, 1, 1, 1)
        return torch.where(wide > 0, _rounded(values, self.step * wide.clamp(min=0.5)), values)

    def rate_bytes(self, features: torch.Tensor) -> torch.Tensor:
        """Mean code length of one item in bytes, a scalar; in training it also updates the histogram."""
        rows = self.histogram.shape[0]
        levels = (features.float() / self.step).clamp(-ZERO, LEVELS - 1 - ZERO)
        below = levels.detach().floor().clamp(max=LEVELS - 2 - ZERO)
        row = torch.arange(rows, device=features.device).view(1, features.shape[1], *(self.plane or (1, 1))) * LEVELS
        index = (below + ZERO).long() + row
        if self.training:
            nearest = (levels.detach().round() + ZERO).long() + row
            counts = torch.bincount(nearest.flatten(), minlength=rows * LEVELS).view(rows, LEVELS)
            self.histogram.lerp_(counts / counts.sum(1, keepdim=True), 1 - HISTOGRAM_DECAY)
        lengths = -torch.log2(self.histogram * (1 - LEVELS * _FLOOR) + _FLOOR).flatten()
        share = levels - below
        bits = lengths[index] * (1 - share) + lengths[index + 1] * share
        return bits.sum() / (8 * len(features))


def _rounded(values: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
    levels = (values / step).clamp(-ZERO, LEVELS - 1 - ZERO)
    return (levels + (levels.round() - levels).detach()) * step
