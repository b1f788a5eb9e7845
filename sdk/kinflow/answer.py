"""What an app gets back from one inference."""

from __future__ import annotations

import msgspec

from kinflow.messages import Hop, Tier


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds spent on the device, and by each server that worked on the request."""

    compute_ms: float
    """Preprocessing, the member's layers and the confidence."""
    encode_ms: float = 0.0
    link_ms: float = 0.0
    """From publishing the request to its reply, servers included."""
    hops: tuple[Hop, ...] = ()
    """The servers, nearest first."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Always names the tier that gave it and why."""

    label: str
    index: int
    """The label's place in the family's labels."""
    confidence: float
    """Calibrated probability that the label is right, by the exit that gave it."""
    tier: Tier
    exit: str
    degraded: bool
    """True: a surer tier was wanted but could not answer in time. Never silent: `reason` says why."""
    reason: str
    """Why this tier gave the answer: what the policy chose and, where more than one server was asked, what happened."""
    bytes_up: int
    """MQTT payload bytes that the device sent; 0 when nothing left the device."""
    bytes_down: int
    total_ms: float
    timings: Timings
    request_id: str
    codec: str = ""
    """How the features were coded that left the device; empty when nothing did."""
