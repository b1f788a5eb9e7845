"""How far to draft. Pure: times and outcomes come in, nothing is looked up.

A verification of g drafts gives 1 + R1 + … + Rg tokens on average, where Rj is the chance that the first j drafts all
stand. One more draft is worth its time when what it adds per second is above what the round gives without it: the
ratio of tokens to time is largest where that stops (the marginal value theorem, Charnov 1976).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, prod
from operator import mul
from typing import Literal, NamedTuple

# A bin of confidence starts as if so many drafts had been seen, standing as often as their confidence said.
PRIOR = 4.0
BINS = 10
# What is old counts less: texts change their subject.
FORGETTING = 0.98
SMOOTHING = 0.2
# Drafted while a verdict is under way, where it is likely enough to be of use. In a replay 0.1 made a token 1% faster
# and cost the device a tenth more, 0.3 the other way round.
AHEAD_CHANCE = 0.2
# What a second of a server's pass is worth, in seconds of waiting: others may need it. More where one for this text is
# under way, which the next would wait for, and where others wait. Found by replaying texts of one family over links and
# servers of several speeds: with one price for both, the same passes take a text up to 15% more time. With 0.2 and 0.5
# texts took as long, within 2%, and a tenth more passes.
IDLE_PRICE = 0.25
BUSY_PRICE = 0.6
# Verifications under way at once, however long the way.
MOST_IN_FLIGHT = 6

Step = Literal["draft", "send", "wait"]


class Moment(NamedTuple):
    """Where drafting stands."""

    in_flight: int
    """Verifications under way."""
    unsent: int
    """Positions that are in none of them."""
    drafted: int
    """Drafts that are in none of them."""
    sent: float
    """The chance that all drafts under way stand."""
    fresh: Sequence[float]
    """The chance of each of the others, if those before it stand."""
    chance: Callable[[], float]
    """That of the next one; 0 where there can be none. To ask takes the device's exit its time."""


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

    features_s: float = 0.0
    """A token's features on the device."""
    exit_s: float = 0.0
    """What its exit says of them."""
    server: Line = field(default_factory=Line)
    """A server's work over the positions of a verification."""

    @property
    def step_s(self) -> float:
        """One draft."""
        return self.features_s + self.exit_s

    def computed(self, seconds: float) -> None:
        """A token's features."""
        self.features_s = _smoothed(self.features_s, seconds)

    def read(self, seconds: float) -> None:
        """The exit's logits."""
        self.exit_s = _smoothed(self.exit_s, seconds)


def _smoothed(usual: float, seen: float) -> float:
    return usual + SMOOTHING * (seen - usual) if usual else seen


@dataclass(frozen=True)
class Plan:
    """When to draft on, when to send, and when to wait."""

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
    queue_s: float = 0.0
    """How long one waits for others there, as a rule."""

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

    @property
    def in_flight(self) -> int:
        """So many verifications fill the way: one that the server works on, and those that travel meanwhile."""
        if self.server_s <= 0:
            return 1
        return min(1 + ceil(self.way_s / self.server_s), MOST_IN_FLIGHT)

    @property
    def furthest(self) -> int:
        """Drafts that there may be at once, in all."""
        return 2 * self.most

    def step(self, at: Moment) -> Step:
        """What to do now."""
        standing = at.sent * prod(at.fresh)
        may_send = at.unsent > 0 and at.in_flight < self.in_flight and (not at.in_flight or standing >= self.floor)
        if may_send and (at.drafted >= self.most or self._doubtful(at, prod(at.fresh))):
            return "send"
        chance = at.chance()
        if may_send and not self._wait_for_more(at, chance):
            return "send"
        if chance > 0 and (not at.in_flight or standing * chance >= AHEAD_CHANCE):
            return "draft"
        return "send" if may_send else "wait"

    def _doubtful(self, at: Moment, all_stand: float) -> bool:
        """Whether drafts that all stand with this chance should not wait for another one.

        Until then one that is wrong stays undiscovered for a step more; a verification of its own costs a pass.
        """
        return (1 - all_stand) * self.step_s >= self._price(at) * self.server_s

    def _price(self, at: Moment) -> float:
        """Of a pass: that of an idle server, or between it and a busy one's.

        Whoever comes at any time to one that is always at work waits half a pass.
        """
        busy = 1.0 if at.in_flight or 2 * self.queue_s >= self.server_s else 2 * self.queue_s / self.server_s
        return IDLE_PRICE + busy * (BUSY_PRICE - IDLE_PRICE)

    def _wait_for_more(self, at: Moment, chance: float) -> bool:
        """Whether what is unsent should go up with one more draft."""
        if self._doubtful(at, prod(at.fresh) * chance):
            return False
        if at.in_flight:
            return True
        tokens = 1 + sum(accumulate(at.fresh, mul))
        return self.more(at.drafted, tokens, prod(at.fresh), chance)
