"""A family in service: each image leaves at the first exit that is sure. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kinflow.confidence import probabilities
from kinflow.manifest import Exit
from kinflow_builder.measure import Labels, TierRun


@dataclass(frozen=True)
class Cascade:
    """All exits with their thresholds."""

    shares: dict[str, float]
    """Share of the images that each member answers."""
    reached: dict[str, float]
    """Share of the images that come to each member."""
    top1: float
    """Share of the answers that are those of `labels`."""
    hop_bytes: dict[str, float]
    """Sent on the hop to each member, per image of all images."""

    @property
    def bytes_mean(self) -> float:
        """Sent per image, over all hops and all images."""
        return sum(self.hop_bytes.values())


def cascade(
    exits: Mapping[str, Exit], runs: Sequence[TierRun], labels: Labels, threshold: float | None = None
) -> Cascade:
    """`threshold` is for all exits but the last one, instead of their own. The last exit keeps what comes to it."""
    waiting = np.ones(len(labels), bool)
    right = np.zeros(len(labels), bool)
    shares, reached, hop_bytes = {}, {}, {}
    for run in runs:
        reached[run.member] = float(waiting.mean())
        hop_bytes[run.member] = float((waiting * run.bytes_up).mean())
        exit = exits[run.exit]
        confidence = probabilities(run.logits, exit.temperature).max(axis=1)
        sure = confidence >= (exit.threshold if threshold is None else threshold)
        kept = waiting & (sure if run is not runs[-1] else True)
        right[kept] = (run.logits.argmax(1) == labels)[kept]
        shares[run.member] = float(kept.mean())
        waiting &= ~kept
    return Cascade(shares, reached, float(right.mean()), hop_bytes)
