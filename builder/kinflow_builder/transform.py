"""The bottleneck of a split in closed form, for a device whose graph is not trained any more.

A linear transform codes Gaussian values best when it decorrelates them and spends one quantiser step on all of
them (Goyal, Theoretical foundations of transform coding, IEEE SPM 2001): directions that vary less than a step
cost next to nothing. What counts here is not the squared error but how much the answer changes, so the
directions are those of the covariance in the metric of the answer's Fisher information.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kinflow_builder.quantiser import LEVELS, ZERO, Bottleneck

# Steps are found to within a thousandth.
BISECTIONS = 16
# Of the features, at most these may lie beyond the outermost levels.
CUT_SHARE = 2.5e-3
# Share of the metric that is plain squared error: what one small model's answer ignores another may need.
PLAIN = 0.3
BATCH = 16
_EPSILON = 1e-5


@dataclass(frozen=True)
class Transform:
    """Patches of `side` x `side` hidden values -> features, and back. All float32."""

    side: int
    mean: torch.Tensor
    """[inputs * side * side]"""
    forward: torch.Tensor
    """[inputs * side * side, channels]"""
    back: torch.Tensor
    """[channels, inputs * side * side]"""

    def bottleneck(self, step: float) -> Bottleneck:
        """The projection as a convolution that strides by the patch; its normalisation only moves the zero."""
        size = len(self.mean)
        inputs, channels = size // self.side**2, self.forward.shape[1]
        made = Bottleneck(inputs, channels, step, kernel=self.side, stride=self.side)
        with torch.no_grad():
            made.project.weight.copy_(self.forward.T.reshape(channels, inputs, self.side, self.side))
            made.scale.running_mean.copy_(self.mean @ self.forward)
            made.scale.running_var.fill_(1 - _EPSILON)
        made.eval()
        return made

    def restore(self) -> nn.ConvTranspose2d:
        """Decoded features -> hidden values [n, inputs, height, width]."""
        size = len(self.mean)
        inputs, channels = size // self.side**2, len(self.back)
        made = nn.ConvTranspose2d(channels, inputs, self.side, self.side)
        with torch.no_grad():
            made.weight.copy_(self.back.reshape(channels, inputs, self.side, self.side))
            # A bias per channel, though means differ within a patch: their mean.
            made.bias.copy_(self.mean.view(inputs, -1).mean(1))
        return made


def fit(hidden: torch.Tensor, metric: torch.Tensor, channels: int, side: int) -> Transform:
    """The best `channels` directions of `hidden` [n, inputs, height, width] in `metric` (see `fisher`)."""
    size = metric.shape[0]
    total, count, square = torch.zeros(size, dtype=torch.float64), 0, torch.zeros(size, size, dtype=torch.float64)
    for part in hidden.split(BATCH):
        rows = patches(part, side)
        total += rows.sum(0)
        square += rows.T @ rows
        count += len(rows)
    mean = total / count
    # One mean per channel, so that the projection's zero is the same all over a patch.
    mean = mean.view(-1, side * side).mean(1, keepdim=True).expand(-1, side * side).reshape(-1)
    covariance = square / count - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(PLAIN * torch.eye(size, dtype=torch.float64) + (1 - PLAIN) * metric.double())
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    unroot = vectors @ torch.diag(1 / values.sqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(root @ covariance @ root)
    best = directions.flip(1)[:, :channels]
    return Transform(side, mean.float(), (root @ best).float(), (best.T @ unroot).float())


def fisher(tail: nn.Module, hidden: torch.Tensor, side: int, seed: int) -> torch.Tensor:
    """How the answer of `tail` depends on patches of `hidden`: float32 [size, size], of trace `size`.

    E[g gT] for gradients g of log p(y) with y drawn from the answer's own probabilities: no labels are needed.
    """
    generator = torch.Generator().manual_seed(seed)
    size = hidden.shape[1] * side * side
    total = torch.zeros(size, size, dtype=torch.float64)
    for part in hidden.split(BATCH):
        given = part.float().requires_grad_()
        log_p = functional.log_softmax(tail(given), 1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), given)
        rows = patches(gradient, side)
        total += rows.T @ rows
    return (total * size / total.trace().clamp(min=1e-30)).float()


def step_for(features: torch.Tensor, bytes_target: float) -> float:
    """The step at which the 4-bit levels of `features` have that entropy per item, channel by channel.

    Never so fine that more than one value in four hundred is cut off: entropy falls again below that, as ever more
    values end at the outermost levels, and a second step would meet the budget with most of the features lost.
    """
    low = float(np.quantile(features.abs().numpy(), 1 - CUT_SHARE)) / (ZERO - 0.5)
    high = 1e2 * float(features.std())
    if entropy_bytes(features, low) <= bytes_target:
        return low
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy_bytes(features, middle) > bytes_target else (low, middle)
    return high


def entropy_bytes(features: torch.Tensor, step: float) -> float:
    """Mean size of one item [channels, height, width], if each channel's levels were coded ideally."""
    channels = features.shape[1]
    levels = (features / step).round().clamp(-ZERO, LEVELS - 1 - ZERO).long() + ZERO
    rows = levels + torch.arange(channels).view(1, -1, 1, 1) * LEVELS
    counts = torch.bincount(rows.flatten(), minlength=channels * LEVELS).view(channels, LEVELS).double()
    shares = counts / counts.sum(1, keepdim=True)
    bits = -(counts * shares.clamp(min=1e-12).log2()).sum()
    return float(bits) / (8 * len(features))


def patches(planes: torch.Tensor, side: int) -> torch.Tensor:
    """[n, inputs, height, width] -> float64 [n * height/side * width/side, inputs * side * side]."""
    stacked = functional.pixel_unshuffle(planes, side)
    return stacked.permute(0, 2, 3, 1).flatten(0, 2).double()
