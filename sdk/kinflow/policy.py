"""The rule that keeps an answer or offloads it. Pure: no socket, no clock.

Device and edge server use the same rule; the device is the lowest tier, the cloud has no route.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from kinflow.estimate import LinkEstimate
from kinflow.manifest import Split
from kinflow.messages import Tier

# What a request's header and MQTT add to its features.
HEADER_BYTES = 150


class Rate(Struct, frozen=True):
    """One way to code the features at a split."""

    codec: str
    size_bytes: float
    """Mean coded size, from the bundle."""

    @property
    def sent_bytes(self) -> float:
        return self.size_bytes + HEADER_BYTES


class Route(Struct, frozen=True):
    """A server that could continue the computation."""

    node: str
    tier: Tier
    split: str
    rates: tuple[Rate, ...]
    """The codecs it takes, the preferred one first, then the ever smaller ones."""
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
    """Send the features up, coded by `codec`."""

    route: Route
    codec: str
    reason: str


class Strain(Struct, frozen=True):
    """How hard pressed the machine is that would keep the answer."""

    share: float
    """0: at ease; 1: it should keep nothing."""
    reason: str


Decision = Keep | Offload

CONFIDENT = "confident"
# Strain from which on computing up to the exit is not worth it any more: a threshold half way to 1 keeps little.
EARLY_SHARE = 0.5


def decide(confidence: float, threshold: float, routes: Sequence[Route] | NoRoute, remaining_s: float) -> Decision:
    """`routes`: at least one, in the order of resort; `remaining_s` is what is left of the deadline.

    The first node that is expected to answer in time is asked, with the preferred codec; where the link is too
    slow for that, with the largest smaller one that makes it.
    """
    if confidence >= threshold:
        return _CONFIDENT
    if isinstance(routes, NoRoute):
        return Keep(routes.reason, degraded=not routes.by_choice)
    chosen = _first_in_time(routes, remaining_s)
    if chosen is None:
        return Keep(_too_slow(routes[0], remaining_s), degraded=True)
    reason = f"confidence {confidence:.2f} is below {threshold:.2f}"
    return Offload(chosen.route, chosen.codec, "; ".join(filter(None, (reason, chosen.reason))))


def leave_early(strain: Strain, split: str, routes: Sequence[Route] | NoRoute, remaining_s: float) -> Offload | None:
    """Under hard strain: send the features of `split`, which lies before the device's exit, and compute no further.

    None where the device should go on to its exit: at ease, or when nobody takes features there in time.
    `remaining_s` must leave out what going on would take, so that there is an answer when the server gives none.
    """
    if strain.share < EARLY_SHARE or isinstance(routes, NoRoute):
        return None
    chosen = _first_in_time(routes, remaining_s)
    if chosen is None:
        return None
    reason = f"left at the earlier split {split} because {strain.reason}"
    return Offload(chosen.route, chosen.codec, "; ".join(filter(None, (reason, chosen.reason))))


def _first_in_time(routes: Sequence[Route], remaining_s: float) -> Offload | None:
    """The first route, by its largest codec that is expected to make it; its reason says why not by the preferred."""
    for route in routes:
        for rate in route.rates:
            if route.estimate.expected_s(rate.sent_bytes) <= remaining_s:
                smaller = rate is not route.rates[0]
                return Offload(route, rate.codec, f"{rate.codec}, since {_too_slow(route, remaining_s)}" * smaller)
    return None


def rates(split: Split, codec: str = "") -> tuple[Rate, ...]:
    """How features may leave at a split: by `codec` alone, or by the default one and every smaller one, by size."""
    preferred = codec or split.default_codec
    sizes = {name: spec.bytes_mean for name, spec in split.codecs.items()}
    smaller = [] if codec else [name for name, size in sizes.items() if size < sizes[preferred]]
    smaller.sort(key=lambda name: -sizes[name])
    return tuple(Rate(name, sizes[name]) for name in (preferred, *smaller))


def _too_slow(route: Route, remaining_s: float) -> str:
    rate = route.rates[0]
    expected_ms = route.estimate.expected_s(rate.sent_bytes) * 1e3
    return (
        f"{route.node} needs about {expected_ms:.0f} ms for {rate.codec}, {max(remaining_s, 0) * 1e3:.0f} ms are left"
    )


def raise_threshold(threshold: float, strain: Strain) -> float:
    """Towards 1 with the strain. Only ever up: what is kept still meets the certificate."""
    return threshold + (1 - threshold) * strain.share


# Most answers are this one: made once.
_CONFIDENT = Keep(CONFIDENT, degraded=False)
