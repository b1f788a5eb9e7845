"""Fashion-MNIST's trunk: three segments, two splits, an exit after each segment."""

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


def upscale(inputs: int, outputs: int) -> nn.Sequential:
    """Twice the height and width."""
    return nn.Sequential(conv(inputs, 4 * outputs, kernel=1), nn.PixelShuffle(2))


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


def make(s1: int, s2: int, cloud_width: int, cloud_blocks: int) -> Trunk:
    """`s1` and `s2`: channels of the features at the splits, both 7x7.

    The first bottleneck is a learned block transform, 4x4 every 2 pixels, as image codecs have one; the edge
    segment undoes it.
    """
    return Trunk(
        [
            Segment(
                "device",
                nn.Sequential(conv(1, 16), conv(16, 32, stride=2), Residual(32)),
                split="s1",
                bottleneck=Bottleneck(32, s1, step=1.5, kernel=4, stride=2, padding=1),
                exit="device",
                branch=nn.Sequential(conv(32, 64, stride=2), conv(64, 64), Head(64)),
            ),
            Segment(
                "edge",
                nn.Sequential(upscale(s1, 48), Residual(48), conv(48, 96, stride=2)),
                split="s2",
                bottleneck=Bottleneck(96, s2, step=1.5),
                exit="edge",
                branch=nn.Sequential(conv(96, 96), Head(96)),
            ),
            Segment(
                "cloud",
                nn.Sequential(conv(s2, cloud_width, kernel=1), *(Residual(cloud_width) for _ in range(cloud_blocks))),
                exit="cloud",
                branch=Head(cloud_width),
            ),
        ]
    )
