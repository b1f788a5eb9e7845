"""Where to cut a model, from what its blocks cost and what can be told from their features.

What can be told is measured by a linear probe: ridge regression from the pooled features to the labels (Alain and
Bengio, arXiv 1610.01644), in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kinflow.errors import SettingsError
from kinflow_builder.blocks import Block
from kinflow_builder.cost import cost

BATCH = 50
RIDGE = 1e-2
# How much of the model's cost an additional point of the final accuracy may take, at the first and the later cuts.
COST_WEIGHTS = (1.0, 0.5)
# Where a model is not trained, its features tell nothing yet: so much of its cost lies before each cut.
EVEN_SHARES = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class Candidate:
    """A cut after one block."""

    index: int
    name: str
    shape: tuple[int, ...]
    """Of the features, [channels, height, width] or [tokens, channels]."""
    cost_share: float
    """Multiply-accumulates up to here, as a share of the model's."""
    accuracy: float
    """Of the probe, on images that it was not fitted to."""


def candidates(
    blocks: Sequence[Block], images: torch.Tensor, labels: npt.NDArray[np.int64], classes: int
) -> list[Candidate]:
    """Every place where features may leave. `images`: float32 [n, channels, height, width]; every other one fits
    the probe, the rest measures it. Raises SettingsError where there is none.
    """
    pooled: list[list[torch.Tensor]] = [[] for _ in blocks]
    shapes: list[tuple[int, ...]] = []
    macs: list[int] = []
    with torch.no_grad():
        for begin in range(0, len(images), BATCH):
            x = images[begin : begin + BATCH]
            for index, block in enumerate(blocks):
                if begin == 0:
                    macs.append(cost(block.module.eval(), x[:1]).macs)
                x = block.module.eval()(x)
                if begin == 0:
                    shapes.append(tuple(x.shape[1:]))
                if x.ndim in (3, 4):
                    pooled[index].append(_pool(x))
    share = np.cumsum(macs) / max(sum(macs), 1)
    found = [
        Candidate(
            i, block.name, shapes[i], float(share[i]), probe(torch.cat(pooled[i]).double().numpy(), labels, classes)
        )
        for i, block in enumerate(blocks[:-1])
        if pooled[i]
    ]
    if not found:
        raise SettingsError(
            "no block ends with features [channels, height, width] or [tokens, channels]: nowhere to cut"
        )
    return found


def choose_splits(found: Sequence[Candidate]) -> list[Candidate]:
    """Two cuts, or one where there is no room for two: each the best of accuracy less weighted cost after the
    one before. Of equals, the one with fewer values.
    """
    best = max(candidate.accuracy for candidate in found)
    chosen: list[Candidate] = []
    for weight in COST_WEIGHTS:
        left = [c for c in found if not chosen or (c.index > chosen[-1].index and c.cost_share > chosen[-1].cost_share)]
        if left:
            worth = [(c.accuracy / max(best, 1e-9) - weight * c.cost_share, -np.prod(c.shape)) for c in left]
            chosen.append(left[max(range(len(left)), key=worth.__getitem__)])
    return chosen


def even_splits(found: Sequence[Candidate]) -> list[Candidate]:
    """Two cuts, or one where there is no room for two, by cost alone. Of equals, the one with fewer values."""
    chosen: list[Candidate] = []
    for share in EVEN_SHARES:
        left = [c for c in found if not chosen or (c.index > chosen[-1].index and c.cost_share > chosen[-1].cost_share)]
        if left:
            chosen.append(min(left, key=lambda c: (abs(c.cost_share - share), np.prod(c.shape))))
    return chosen


def probe(features: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], classes: int) -> float:
    """Top-1 share of a linear probe: features [n, values]; the even rows fit it, the odd ones measure it."""
    fit, test = slice(0, None, 2), slice(1, None, 2)
    spread = features[fit].std(axis=0) + 1e-6
    x = (features - features[fit].mean(axis=0)) / spread
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    targets = np.eye(classes)[labels]
    # The dual form where there are more values than images.
    a, y = x[fit], targets[fit]
    penalty = RIDGE * len(a)
    if a.shape[0] < a.shape[1]:
        weights = a.T @ np.linalg.solve(a @ a.T + penalty * np.eye(len(a)), y)
    else:
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ y)
    return float(((x[test] @ weights).argmax(axis=1) == labels[test]).mean())


def _pool(x: torch.Tensor) -> torch.Tensor:
    axes = (2, 3) if x.ndim == 4 else (1,)
    return torch.cat([x.mean(axes), x.amax(axes)], dim=1)
