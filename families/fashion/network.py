"""Fashion-MNIST's trunk: the device's segment, and two tails that both continue from its features."""

from __future__ import annotations

import torch
from torch import nn

from kinflow_builder.quantiser import Bottleneck
from kinflow_builder.trunk import Segment, Trunk

LABELS = 10


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):  # type: ignore[misc]
    """Two convolutions beside an identity; it begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.second[1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


class Head(nn.Module):  # type: ignore[misc]
    """Mean over the image, then one linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


def tail(name: str, inputs: int, width: int, blocks: int) -> Segment:
    """From the device's features to an exit, at their resolution."""
    layers = nn.Sequential(conv(inputs, width, kernel=1), *(Residual(width) for _ in range(blocks)))
    return Segment(name, layers, source="s1", exit=name, branch=Head(width))


def make(
    width: int, blocks: int, s1: int, edge_width: int, edge_blocks: int, cloud_width: int, cloud_blocks: int
) -> Trunk:
    """`s1`: channels of the features, 7x7. The other widths are channels, at 14x14 on the device, 7x7 above.

    The bottleneck is a learned block transform, 4x4 every 2 pixels, as image codecs have one. All images have the
    same layout, so each position has statistics of its own.
    """
    branch = nn.Sequential(conv(width, 72, stride=2), conv(72, 72), Head(72))
    device = Segment(
        "device",
        nn.Sequential(
            conv(1, width // 2), conv(width // 2, width, stride=2), *(Residual(width) for _ in range(blocks))
        ),
        split="s1",
        bottleneck=Bottleneck(width, s1, step=1.5, kernel=4, stride=2, padding=1, plane=(7, 7)),
        exit="device",
        branch=branch,
    )
    return Trunk([device, tail("edge", s1, edge_width, edge_blocks), tail("cloud", s1, cloud_width, cloud_blocks)])
