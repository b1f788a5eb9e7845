"""Temperature and certificate of an exit, from logits on images never trained on. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from kinflow.confidence import probabilities

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Losses = npt.NDArray[np.bool_]

# Thresholds that are tested, safest first. Fixed before any data are seen, as the testing order must be.
THRESHOLDS = (*(round(1.0 - 0.005 * i, 3) for i in range(200)), 0.0)


def temperature(logits: Logits, labels: Labels) -> float:
    """The T that makes softmax(logits / T) most likely (Guo et al., arXiv 1706.04599).

    With a prior, log T ~ N(0, 1), which a hundred images outweigh: where a few are all answered rightly, every
    smaller T is likelier still, and an exit would be certain of all it ever says.
    """
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        right = probabilities(logits, float(np.exp(log_t)))[rows, labels]
        return float(-np.log(np.maximum(right, 1e-30)).mean()) + log_t**2 / (2 * len(labels))

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


def gap(exit_logits: Logits, last_logits: Logits, labels: Labels) -> Losses:
    """Where the exit is wrong and the last exit is right: what keeping the answer would cost."""
    losses: Losses = (exit_logits.argmax(1) != labels) & (last_logits.argmax(1) == labels)
    return losses


def inconsistency(exit_logits: Logits, last_logits: Logits) -> Losses:
    """Where the exit's answer is not the last exit's; needs no labels, and is never less than the gap."""
    losses: Losses = exit_logits.argmax(1) != last_logits.argmax(1)
    return losses


@dataclass(frozen=True)
class Certified:
    """What `certify` found; a kept share of 0 means that nothing is certified that would keep an answer."""

    threshold: float
    kept_share: float
    losses: int
    """Kept answers that are losses, of the n images."""
    n: int


def certify(confidence: npt.NDArray[np.float64], losses: Losses, epsilon: float, delta: float) -> Certified:
    """The lowest threshold with P(risk <= epsilon) >= 1 - delta.

    The risk of a threshold is the share of all images whose answer is kept (confidence at or above it) and is
    a loss. Learn then Test (Angelopoulos et al., arXiv 2110.01052): for each threshold the exact binomial
    p-value of "risk > epsilon", tested in a fixed order from the safest one down; the last one that passes is
    returned, and testing stops at the first that does not.
    """
    n = len(losses)
    lost = np.sort(confidence[losses])
    counts = len(lost) - np.searchsorted(lost, THRESHOLDS, side="left")
    passes = binom.cdf(counts, n, epsilon) <= delta
    tested = len(THRESHOLDS) if passes.all() else int(passes.argmin())
    if tested == 0:
        return Certified(1.0, 0.0, 0, n)
    threshold = THRESHOLDS[tested - 1]
    return Certified(threshold, float((confidence >= threshold).mean()), int(counts[tested - 1]), n)


def p_value(losses: int, n: int, epsilon: float) -> float:
    """P(so few losses or fewer among n | risk = epsilon): exact, super-uniform when risk > epsilon."""
    return float(binom.cdf(losses, n, epsilon))


def fewest(epsilon: float, delta: float) -> int:
    """The images that a certificate needs when none of them is a loss: (1 - epsilon)^n <= delta."""
    n = max(1, math.floor(math.log(delta) / math.log1p(-epsilon)) - 1)
    while p_value(0, n, epsilon) > delta:
        n += 1
    return n
