"""The rule that keeps an answer or offloads it. Pure: no socket, no clock.

Device and edge server use the same rule; the device is the lowest tier, the cloud has no route.
"""

from __future__ import annotations

from msgspec import Struct

from kinflow.messages import Tier


class LinkEstimate(Struct, frozen=True):
    """What is known of the way to one server."""

    round_trip_s: float
    """Smoothed time from sending a request to its reply, without the server's own queue."""
    queue_s: float
    """Queue delay that the server reported last."""

    @property
    def expected_s(self) -> float:
        return self.round_trip_s + self.queue_s


class Route(Struct, frozen=True):
    """A server that could continue the computation."""

    node: str
    tier: Tier
    split: str
    codec: str
    estimate: LinkEstimate


class NoRoute(Struct, frozen=True):
    """Nothing above can be asked, and why."""

    reason: str
    by_choice: bool = False
    """The settings have it so: then the answer is as good as was wanted, not degraded."""


class Keep(Struct, frozen=True):
    """Answer here. `degraded`: the exit was not sure enough, but nothing above can help in time."""

    reason: str
    degraded: bool


class Offload(Struct, frozen=True):
    """Send the features up."""

    route: Route
    reason: str


Decision = Keep | Offload

CONFIDENT = "confident"


def decide(confidence: float, threshold: float, route: Route | NoRoute, remaining_s: float) -> Decision:
    """`route` is the best server above; `remaining_s` is what is left of the deadline."""
    if confidence >= threshold:
        return _CONFIDENT
    if isinstance(route, NoRoute):
        return Keep(route.reason, degraded=not route.by_choice)
    expected = route.estimate.expected_s
    if expected > remaining_s:
        reason = f"{route.node} needs about {expected * 1e3:.0f} ms, {max(remaining_s, 0) * 1e3:.0f} ms are left"
        return Keep(reason, degraded=True)
    return Offload(route, f"confidence {confidence:.2f} is below {threshold:.2f}")


# Most answers are this one: made once.
_CONFIDENT = Keep(CONFIDENT, degraded=False)
