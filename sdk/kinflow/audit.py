"""Does the certificate still hold? A test that may be looked at after every sample. Pure.

The certificate says: of all images, at most the share epsilon are kept and lost. Each audited image gives a loss
between 0 and 1. Bet against "the mean loss is at most m", for many m and many stakes at once:

    wealth(m, s) = product over the losses x of 1 + s × (x - m)

If the claim is true, no stake's wealth is expected to grow, nor is their mean; and it ever reaches 1 / delta with
probability delta at the most (Ville's inequality). So all m whose wealth has reached it are refuted, at any time.
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86 (2024), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Stake k - 1 grows fastest when the risk is k times what is claimed.
_STAKES = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
# The claims that are bet against, as multiples of epsilon; 1 is the certificate's.
_CLAIMS = np.array([0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0])
_CERTIFIED = int(np.flatnonzero(_CLAIMS == 1.0)[0])
# No stake may lose all it has: 1 - s × m stays above this.
_MIN_LEFT = 0.1


@dataclass(frozen=True)
class Audit:
    """What the audited images say so far."""

    n: int
    """Images drawn, kept or not."""
    risk: float
    """Their mean loss."""
    at_least: float
    """The risk is at least this, with confidence 1 - delta, however often it is looked at."""
    epsilon: float
    holds: bool
    """False: the certificate is refuted."""


class RiskTest:
    """Feed it losses with `observe`; `audit` says how it stands."""

    def __init__(self, epsilon: float, delta: float) -> None:
        self._epsilon = epsilon
        self._limit = math.log(1 / delta)
        self._claims = np.minimum(_CLAIMS * epsilon, 1.0)
        # A row per claim, a column per stake.
        self._stakes = np.minimum(_STAKES[None, :], (1 - _MIN_LEFT) / self._claims[:, None])
        self._log_wealth = np.zeros(self._stakes.shape)
        self._peak = np.zeros(len(self._claims))
        self._n = 0
        self._total = 0.0

    def observe(self, loss: float) -> None:
        """One image's loss, 0 to 1; 0 for one that was not kept."""
        self._n += 1
        self._total += loss
        self._log_wealth += np.log1p(self._stakes * (loss - self._claims[:, None]))
        self._peak = np.maximum(self._peak, np.logaddexp.reduce(self._log_wealth, axis=1) - math.log(len(_STAKES)))

    @property
    def audit(self) -> Audit:
        refuted = self._peak >= self._limit
        return Audit(
            n=self._n,
            risk=self._total / max(self._n, 1),
            at_least=float(self._claims[refuted].max(initial=0.0)),
            epsilon=self._epsilon,
            holds=not refuted[_CERTIFIED],
        )
