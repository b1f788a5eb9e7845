"""When a node that fails is left alone, and when it is tried again. Pure: the clock and the jitter come in.

    closed --(TRIP_AFTER failures in a row)--> open --(its wait is over)--> half-open
    half-open --(a probe comes back)--> closed        half-open --(it does not)--> open, for longer

Requests go to a closed one only; a half-open one is asked with a probe, so that no inference pays for the try.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TRIP_AFTER = 3
# Doubled each time; with the jitter, a probe's timeout and a connect, a node that is back is used within 5 s.
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 3.0
MIN_JITTER = 0.5

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True)
class Breaker:
    """One node's; replaced by each event."""

    failures: int = 0
    """In a row."""
    retry_at_s: float = 0.0
    """When it may be tried again, once it is open."""

    def state(self, now_s: float) -> State:
        if self.failures < TRIP_AFTER:
            return "closed"
        return "open" if now_s < self.retry_at_s else "half-open"

    def succeeded(self) -> Breaker:
        """It answered, whatever it said."""
        return Breaker()

    def failed(self, now_s: float, chance: float) -> Breaker:
        """It did not answer in its time, or answered with a failure. `chance`: random, 0 to 1.

        The wait is that share of the way from half of the full one to all of it: devices that lost a server in
        the same moment do not come back in the same moment.
        """
        failures = self.failures + 1
        if failures < TRIP_AFTER:
            return Breaker(failures)
        full_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - TRIP_AFTER, 16))
        return Breaker(failures, now_s + full_s * (MIN_JITTER + (1 - MIN_JITTER) * chance))

    def back(self, now_s: float) -> Breaker:
        """It said itself that it is there again: try it now."""
        return Breaker(self.failures, now_s)
