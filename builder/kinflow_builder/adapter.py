"""The adapter of a stitched member: maps the device's hidden values onto a larger member's at the split.

First a 3 x 3 convolution fitted by least squares on unlabelled images (as in Pan et al., Stitchable Neural
Networks, CVPR 2023, who fit a 1 x 1 one). Where that is not enough, an inverted residual beside it, which begins
as zero, is trained by distillation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

KERNEL = 3
EXPAND = 4
# Of each input's energy: keeps the equations solvable where inputs depend on each other.
RIDGE = 1e-4


class Adapter(nn.Module):  # type: ignore[misc]
    """Hidden values [n, inputs, height, width] -> [n, outputs, height', width'], by a whole factor smaller."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bent: bool) -> None:
        super().__init__()
        wide = inputs * EXPAND
        self.linear = nn.Conv2d(inputs, outputs, KERNEL, stride, KERNEL // 2)
        self.bend: nn.Module | None = None
        if bent:
            last = nn.Conv2d(wide, outputs, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.bend = nn.Sequential(
                nn.Conv2d(inputs, wide, 1),
                nn.ReLU(),
                nn.Conv2d(wide, wide, KERNEL, stride, KERNEL // 2, groups=wide),
                nn.ReLU(),
                last,
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        straight = self.linear(hidden)
        return straight if self.bend is None else straight + self.bend(hidden)


def fit_linear(adapter: Adapter, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Least squares from hidden values to the larger member's: `pairs` are batches of both, in one order."""
    layer = adapter.linear
    size = layer.in_channels * KERNEL**2 + 1
    energy = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, layer.out_channels, dtype=torch.float64)
    for given, wanted in pairs:
        seen = functional.unfold(given.float(), KERNEL, padding=KERNEL // 2, stride=layer.stride)
        rows = seen.transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        energy += (rows.T @ rows).double()
        cross += (rows.T @ wanted.float().flatten(2).transpose(1, 2).flatten(0, 1)).double()
    ridge = torch.diag(energy.diagonal() * RIDGE + 1e-9)
    solved = torch.linalg.solve(energy + ridge, cross).float()
    with torch.no_grad():
        layer.weight.copy_(solved[:-1].T.view_as(layer.weight))
        layer.bias.copy_(solved[-1])


def unexplained(adapter: Adapter, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Share of the wanted values' variance that the adapter misses: 0 is a perfect fit, 1 is none."""
    missed = total = 0.0
    with torch.no_grad():
        for given, wanted in pairs:
            values = wanted.float()
            missed += float((adapter(given.float()) - values).square().sum())
            total += float((values - values.mean((0, 2, 3), keepdim=True)).square().sum())
    return missed / max(total, 1e-12)
