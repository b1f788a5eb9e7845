"""When drafting on the device is faster than streaming from a server: the break-even of acceptance and round trip.

Drafts go on while verdicts are under way, so a token takes a step of the device, and where a draft falls also the way
and a pass: step + (1 - acceptance) x (round trip + pass). The server alone takes a whole pass for every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Round trips of the plot, seconds.
SHORTEST, LONGEST, POINTS = 0.001, 0.3, 60


class Speeds(NamedTuple):
    """Seconds."""

    features_s: float
    """A token's features on the device."""
    exit_s: float
    """What its exit says of them: a draft."""
    pass_s: float
    """A verification on the server."""
    whole_s: float
    """A token on the server alone."""

    @property
    def step_s(self) -> float:
        """A token that the device drafts."""
        return self.features_s + self.exit_s


class Measured(NamedTuple):
    """One link's outcome."""

    round_trip_s: float
    share: float
    """Of its time that the server had."""
    acceptance: float
    """Tokens that were the device's drafts, of all."""
    speedup: float
    """Over the server alone."""


def drafted_s(speeds: Speeds, acceptance: float, round_trip_s: float, share: float = 1.0) -> float:
    """Seconds per token at best, where the server has `share` of its time for this text."""
    return speeds.step_s + (1 - acceptance) * (round_trip_s + speeds.pass_s / share)


def naive_s(speeds: Speeds, round_trip_s: float) -> float:
    """Seconds per token where each one takes the whole way, and nothing is drafted."""
    return speeds.features_s + round_trip_s + speeds.pass_s


def needed(speeds: Speeds, round_trip_s: float, share: float = 1.0) -> float:
    """The acceptance from which on drafting is as fast as the server alone; above 1 it never is."""
    return 1 - (speeds.whole_s / share - speeds.step_s) / (round_trip_s + speeds.pass_s / share)


def figures(
    speeds: Speeds, acceptance: float, round_trips_s: Sequence[float], shares: Sequence[float]
) -> dict[str, object]:
    """For the JSON: what the model says beside what was measured."""
    links = [(trip_s, share) for trip_s in round_trips_s for share in shares]
    return {
        "features_ms": speeds.features_s * 1e3,
        "exit_ms": speeds.exit_s * 1e3,
        "pass_ms": speeds.pass_s * 1e3,
        "whole_ms": speeds.whole_s * 1e3,
        "acceptance": acceptance,
        "needed_acceptance": {
            f"{trip_s * 1e3:g} ms, server at {share:.0%}": needed(speeds, trip_s, share) for trip_s, share in links
        },
        "best_over_naive": {
            f"{trip_s * 1e3:g} ms": naive_s(speeds, trip_s) / drafted_s(speeds, acceptance, trip_s)
            for trip_s in round_trips_s
        },
    }


def plot(path: Path, speeds: Speeds, shares: Mapping[str, float], measured: Sequence[Measured]) -> None:
    """PNG. Above a line drafting is faster; filled marks were measured to be, hollow ones not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    trips = [SHORTEST * (LONGEST / SHORTEST) ** (at / (POINTS - 1)) for at in range(POINTS)]
    for number, (label, share) in enumerate(shares.items()):
        colour = f"C{number}"
        axes.plot([trip * 1e3 for trip in trips], [needed(speeds, trip, share) for trip in trips], colour, label=label)
        for point in measured:
            if point.share == share:
                filled = "full" if point.speedup >= 1 else "none"
                axes.plot(point.round_trip_s * 1e3, point.acceptance, "o", color=colour, fillstyle=filled)
    axes.set(xscale="log", ylim=(0, 1), xlabel="round trip, ms", ylabel="drafts that stand, of all tokens")
    axes.set_title("Where drafting on the device is as fast as the server alone")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
