"""EfficientNet-Lite 0, 1 and 2, cut in two (Tan and Le, arXiv 1905.11946; Lite: those made for TensorFlow Lite).

Batch normalisation is folded into the convolutions: the networks are trained already. All three are laid out
for the family's own image size, 224 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from kinflow_builder.stitch import Pretrained

PIXELS = 224
CLASSES = 1000
STEM = 32
HEAD = 1280
EPSILON = 1e-3
# The features that leave the device are those of the fourth stage: 80 x 14 x 14.
STAGES_BELOW = 4

State = dict[str, torch.Tensor]


class Stage(NamedTuple):
    """Inverted residual blocks; only the first one strides and widens."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    inputs: int
    outputs: int


STAGES = (
    Stage(1, 3, 1, 1, 32, 16),
    Stage(2, 3, 2, 6, 16, 24),
    Stage(2, 5, 2, 6, 24, 40),
    Stage(3, 3, 2, 6, 40, 80),
    Stage(3, 5, 1, 6, 80, 112),
    Stage(4, 5, 2, 6, 112, 192),
    Stage(1, 3, 1, 6, 192, 320),
)


class Convolution(nn.Module):  # type: ignore[misc]
    """As TensorFlow pads it: with stride 2 an even side gets more on the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, side: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = (math.ceil(side / stride) - 1) * stride + kernel - side
        before, after = padding // 2, padding - padding // 2
        self.padding = (before, after, before, after) if before != after else None
        given = 0 if self.padding else before
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, given, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x if self.padding is None else functional.pad(x, self.padding))


class InvertedResidual(nn.Module):  # type: ignore[misc]
    """Widen, one filter per channel, narrow; with a shortcut where the shapes allow it."""

    def __init__(self, stage: Stage, side: int) -> None:
        super().__init__()
        wide = stage.inputs * stage.expand
        self.widen = Convolution(stage.inputs, wide, 1, side) if stage.expand > 1 else None
        self.depthwise = Convolution(wide, wide, stage.kernel, side, stride=stage.stride, groups=wide)
        self.narrow = Convolution(wide, stage.outputs, 1, math.ceil(side / stage.stride))
        self.shortcut = stage.stride == 1 and stage.inputs == stage.outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if self.widen is None else functional.relu6(self.widen(x))
        narrow = self.narrow(functional.relu6(self.depthwise(wide)))
        return x + narrow if self.shortcut else narrow


class Stem(nn.Module):  # type: ignore[misc]
    """The first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = Convolution(3, STEM, 3, PIXELS, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu6(self.convolution(x))


class Head(nn.Module):  # type: ignore[misc]
    """Features of the last stage -> logits."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(inputs, HEAD, 1)
        self.classify = nn.Linear(HEAD, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(functional.relu6(self.widen(x)).mean((2, 3)))


def lite0(weights: State) -> Pretrained:
    """The device's member."""
    return efficientnet_lite(weights, width=1.0, depth=1.0)


def lite1(weights: State) -> Pretrained:
    """The edge's member."""
    return efficientnet_lite(weights, width=1.0, depth=1.1)


def lite2(weights: State) -> Pretrained:
    """The cloud's member."""
    return efficientnet_lite(weights, width=1.1, depth=1.2)


def efficientnet_lite(weights: State, width: float, depth: float) -> Pretrained:
    """The network of that width and depth with `weights` (names as in EfficientNet-PyTorch) folded in."""
    stem = Stem()
    _fold(stem.convolution.convolution, weights, "_conv_stem", "_bn0")
    stages: list[nn.Module] = []
    side, index = PIXELS // 2, 0
    for number, plan in enumerate(STAGES):
        ends = number in (0, len(STAGES) - 1)
        outputs = rounded(plan.outputs, width)
        inputs = STEM if number == 0 else rounded(plan.inputs, width)
        blocks = []
        for repeat in range(plan.repeats if ends else math.ceil(plan.repeats * depth)):
            first = repeat == 0
            stage = plan._replace(
                stride=plan.stride if first else 1, inputs=inputs if first else outputs, outputs=outputs
            )
            block = InvertedResidual(stage, side)
            _fold_block(block, weights, f"_blocks.{index}.")
            side, index = math.ceil(side / stage.stride), index + 1
            blocks.append(block)
        stages.append(nn.Sequential(*blocks))
    head = Head(outputs)
    _fold(head.widen, weights, "_conv_head", "_bn1")
    head.classify.load_state_dict({name: weights[f"_fc.{name}"] for name in ("weight", "bias")})
    return Pretrained(
        below=nn.Sequential(stem, *stages[:STAGES_BELOW]),
        above=nn.Sequential(*stages[STAGES_BELOW:], head),
    )


def rounded(channels: int, width: float) -> int:
    """The multiple of 8 nearest to `channels * width`, at most a tenth below it."""
    wanted = channels * width
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest


def _fold_block(block: InvertedResidual, weights: State, prefix: str) -> None:
    if block.widen is not None:
        _fold(block.widen.convolution, weights, f"{prefix}_expand_conv", f"{prefix}_bn0")
    _fold(block.depthwise.convolution, weights, f"{prefix}_depthwise_conv", f"{prefix}_bn1")
    _fold(block.narrow.convolution, weights, f"{prefix}_project_conv", f"{prefix}_bn2")


def _fold(convolution: nn.Conv2d, weights: State, name: str, norm: str) -> None:
    """conv, then (y - mean) / sqrt(var + eps) * weight + bias, as one convolution with a bias."""
    gain = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + EPSILON)
    with torch.no_grad():
        convolution.weight.copy_(weights[f"{name}.weight"] * gain.view(-1, 1, 1, 1))
        convolution.bias.copy_(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain)


MEMBERS: dict[str, Callable[[State], Pretrained]] = {"lite0": lite0, "lite1": lite1, "lite2": lite2}
