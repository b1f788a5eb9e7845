"""How far to draft. Pure: times and outcomes come in, nothing is looked up.

A verification of g drafts gives 1 + R1 + … + Rg tokens on average, where Rj is the chance that the first j drafts all
stand. One more draft is worth its time when what it adds per second is above what the round gives without it: the
ratio of tokens to time is largest where that stops (the marginal value theorem, Charnov 1976).
"""

from __future__ import annotations

from dataclasses import dataclass, field

# A bin of confidence starts as if so many drafts had been seen, standing as often as their confidence said.
PRIOR = 4.0
BINS = 10
# What is old counts less: texts change their subject.
FORGETTING = 0.98
SMOOTHING = 0.2


class Acceptance:
    """How often drafts of a given confidence stand, learned from verdicts."""

    def __init__(self) -> None:
        self._seen = [0.0] * BINS
        self._stood = [0.0] * BINS
        self.drafts = 0
        self.accepted = 0

    def saw(self, confidence: float, stood: bool) -> None:
        """A draft whose predecessors all stood was decided."""
        at = _bin(confidence)
        self._seen[at] = self._seen[at] * FORGETTING + 1
        self._stood[at] = self._stood[at] * FORGETTING + stood
        self.drafts += 1
        self.accepted += stood

    def chance(self, confidence: float) -> float:
        """That a draft of this confidence stands."""
        at = _bin(confidence)
        return (self._stood[at] + PRIOR * confidence) / (self._seen[at] + PRIOR)


def _bin(confidence: float) -> int:
    return min(int(confidence * BINS), BINS - 1)


class Line:
    """Time = fixed + slope × positions, fitted to what was seen lately (weighted least squares)."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def saw(self, positions: int, seconds: float) -> None:
        keep = 1 - SMOOTHING
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + positions
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + positions * positions
        self._xy = self._xy * keep + positions * seconds

    def fit(self) -> tuple[float, float]:
        """(fixed, slope) in seconds, neither below 0. All of the time is fixed while the positions do not differ."""
        if self._weight == 0:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance < 1e-9 * max(1.0, mean_x * mean_x):
            return mean_y, 0.0
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y - slope * mean_x, slope


@dataclass
class Pace:
    """How fast both sides are; seconds."""

    step_s: float = 0.0
    """One token on the device."""
    server: Line = field(default_factory=Line)
    """A server's work over the positions of a verification."""

    def stepped(self, seconds: float) -> None:
        self.step_s = seconds if self.step_s == 0 else self.step_s + SMOOTHING * (seconds - self.step_s)


@dataclass(frozen=True)
class Plan:
    """When a round's drafting stops."""

    floor: float
    """A draft that stands with less than this chance is not worth a server's position."""
    most: int
    way_s: float
    """To the server and back, for no features at all."""
    step_s: float
    server_s: float
    """What a verification takes on the server beside its positions."""
    position_s: float
    """What each position adds: on the server, and on the way up."""
    others_s: float = 0.0
    """What a verification takes from others that wait for the server."""

    def more(self, drafted: int, tokens: float, standing: float, chance: float) -> bool:
        """Whether to add a draft.

        `drafted`: how many there are; `tokens`: what they give on average, the server's own included; `standing`:
        the chance that all of them stand; `chance`: that the next one does, if they do.
        """
        gain = standing * chance
        if drafted >= self.most or chance < self.floor or gain < self.floor * self.floor:
            return False
        round_s = self.way_s + self.server_s + self.others_s + (1 + drafted) * (self.step_s + self.position_s)
        return gain * round_s >= tokens * (self.step_s + self.position_s)
