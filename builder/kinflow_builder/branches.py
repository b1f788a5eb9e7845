"""Way one of aligning: one backbone, cut into segments, with a bottleneck at each cut and a branch for each exit.

The members share the backbone, so their features are the same by construction; what has to be learnt is that the
layers after a cut read what comes out of its codec, and that the branches answer early (BranchyNet, arXiv 1709.01686;
early exits with scalable branches, arXiv 2506.12479).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder.blocks import Block, last_of
from kinflow_builder.quantiser import Bottleneck
from kinflow_builder.trunk import Segment, Trunk

# A plane is made this small before it is sent, and as small as this at a branch's end.
SENT_SIDE = 14
BRANCH_SIDE = 7
BRANCH_WIDTH = 256
STEP = 1.5


class AsPlane(nn.Module):  # type: ignore[misc]
    """Tokens [n, tokens, channels] -> [n, channels, tokens, 1]; planes stay as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).unsqueeze(3) if x.ndim == 3 else x


class AsTokens(nn.Module):  # type: ignore[misc]
    """[n, channels, tokens, 1] -> [n, tokens, channels]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(3).transpose(1, 2)


def trunk_of(
    blocks: Sequence[Block],
    example: torch.Tensor,
    after: Sequence[str],
    members: Sequence[str],
    channels: Sequence[int],
    *,
    frozen: bool = False,
) -> Trunk:
    """`example`: an input [1, channels, height, width].

    `after`: the blocks after which the backbone is cut, in order; `members`: a name for each piece, which is the
    name of its segment and its exit; `channels`: of the features at each cut. `frozen`: the backbone's weights
    stay as they are. Raises SettingsError that names the block.
    """
    ends = [last_of(blocks, name) for name in after]
    if len(members) != len(ends) + 1 or len(channels) != len(ends):
        raise SettingsError(f"{len(ends)} cuts make {len(ends) + 1} members, there are {len(members)}: {list(members)}")
    if any(b <= a for a, b in itertools.pairwise(ends)) or ends[-1] >= len(blocks) - 1:
        raise SettingsError(f"cuts {list(after)} are not in the model's order, or after its last block")
    classes = _outputs(blocks, example)
    segments: list[Segment] = []
    restore: list[nn.Module] = []
    begin, hidden = 0, example
    for number, (end, member) in enumerate(zip([*ends, len(blocks) - 1], members, strict=True)):
        pieces = [block.module.requires_grad_(not frozen) for block in blocks[begin : end + 1]]
        last = end == len(blocks) - 1
        # The backbone's own last block is the branch of the last exit.
        layers = nn.Sequential(*restore, *(pieces[:-1] if last else pieces))
        if last:
            segments.append(Segment(member, layers, exit=member, branch=pieces[-1]))
            break
        hidden = _through(pieces, hidden)
        _check_split(blocks[end].name, hidden)
        split = f"s{number + 1}"
        bottleneck, restore = around(hidden, channels[number])
        branch = branch_for(hidden, classes)
        segments.append(Segment(member, layers, split=split, bottleneck=bottleneck, exit=member, branch=branch))
        begin = end + 1
    return Trunk(segments)


def around(hidden: torch.Tensor, channels: int) -> tuple[nn.Module, list[nn.Module]]:
    """A bottleneck for features like `hidden`, and the layers that undo it on the other side."""
    plane = AsPlane()(hidden)
    inputs, height, width = plane.shape[1:]
    tokens = hidden.ndim == 3
    stride = 1 if tokens else max(1, -(-max(height, width) // SENT_SIDE))
    bottleneck = Bottleneck(inputs, channels, STEP, kernel=stride, stride=stride, before=AsPlane() if tokens else None)
    undo: list[nn.Module] = [nn.Conv2d(channels, inputs, 1, bias=False), nn.BatchNorm2d(inputs)]
    if stride > 1:
        undo.insert(0, nn.Upsample((height, width), mode="bilinear", align_corners=False))
    return bottleneck, [*undo, Refine(inputs, tokens), *([AsTokens()] if tokens else [])]


class Refine(nn.Module):  # type: ignore[misc]
    """A small residual correction after the bottleneck; it begins as the identity."""

    def __init__(self, channels: int, tokens: bool) -> None:
        super().__init__()
        spatial = nn.Identity() if tokens else nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.layers = nn.Sequential(
            spatial,
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def branch_for(hidden: torch.Tensor, classes: int) -> nn.Module:
    """Branch and head of an early exit: depthwise separable convolutions down to a small plane, mean, linear."""
    if hidden.ndim == 3:
        width = hidden.shape[2]
        mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        return nn.Sequential(mix, nn.LayerNorm(width), Mean(1), nn.Linear(width, classes))
    width, side = hidden.shape[1], max(hidden.shape[2:])
    layers: list[nn.Module] = []
    while side > BRANCH_SIDE or len(layers) < 2:
        stride = 2 if side > BRANCH_SIDE else 1
        wider = min(max(2 * width, 64), max(BRANCH_WIDTH, width))
        layers.append(_separable(width, wider, stride))
        width, side = wider, -(-side // stride)
    return nn.Sequential(*layers, Mean(2, 3), nn.Linear(width, classes))


class Mean(nn.Module):  # type: ignore[misc]
    """Over the given axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(self.axes)


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _through(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for module in modules:
            x = module.eval()(x)
    return x


def _outputs(blocks: Sequence[Block], example: torch.Tensor) -> int:
    logits = _through([block.module for block in blocks], example)
    if logits.ndim != 2:
        raise SettingsError(f"the model gives {list(logits.shape)}, expected logits [1, classes]")
    return int(logits.shape[1])


def _check_split(name: str, hidden: torch.Tensor) -> None:
    if hidden.ndim not in (3, 4):
        raise SettingsError(
            f"after block {name!r} features have the shape {list(hidden.shape[1:])}: cut where it is "
            "[channels, height, width] or [tokens, channels]"
        )
