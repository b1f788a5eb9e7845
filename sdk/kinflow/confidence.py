"""Calibrated confidence from logits. Pure.

Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017): softmax(logits / T), T fitted
per exit by likelihood on held-out data. It calibrates; what bounds the risk is the certificate's threshold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# No exit is certain, however its logits round: a threshold of 1 keeps nothing.
MOST = math.nextafter(1.0, 0.0)


class Reading(NamedTuple):
    """What an exit says: the label's index and the calibrated probability that it is right."""

    label: int
    confidence: float


def read(logits: npt.NDArray[np.float32], temperature: float) -> Reading:
    """One item: `logits` of shape [classes]. Logits that are not finite give the confidence 0."""
    label = int(logits.argmax())
    # The largest term of the softmax is exp(0); the others are relative to it.
    confidence = float(1.0 / np.exp((logits - logits[label]) / temperature).sum())
    return Reading(label, min(confidence, MOST) if math.isfinite(confidence) else 0.0)


def probabilities(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """softmax(logits / temperature) over the last axis."""
    scaled = np.asarray(logits, np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    terms = np.exp(scaled)
    return np.asarray(terms / terms.sum(axis=-1, keepdims=True))
