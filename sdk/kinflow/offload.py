"""One offload of a device: features coded and sent, the servers' reply made an Answer, or why there is none."""

from __future__ import annotations

import time
from typing import NamedTuple

from kinflow.answer import Answer, Timings
from kinflow.codec import Features
from kinflow.errors import CodecError, LinkError, LinkTimeout
from kinflow.family import Family
from kinflow.policy import Offload
from kinflow.uplink import Uplink


class Times(NamedTuple):
    """Of time.perf_counter()."""

    start: float
    """When the app asked."""
    computed: float
    """When the device had its features."""
    due: float
    """When there must be an answer, or the knowledge that none comes."""


class Sent(NamedTuple):
    """What left the device, and when (time.perf_counter())."""

    at: float
    encode_ms: float
    bytes_up: int
    codec: str


class Refused(NamedTuple):
    """No server's answer, and why."""

    reason: str
    sent: Sent


def ask(
    uplink: Uplink, family: Family, chosen: Offload, features: Features, request_id: bytes, times: Times
) -> Answer | Refused:
    """Ask the servers to continue from `features`, [1, channels, height, width], at the route's split."""
    decided = time.perf_counter()
    sent = Sent(decided, 0.0, 0, "")
    try:
        payload = family.codec(chosen.route.split, chosen.codec).encode(features[0])
    except CodecError as exc:
        return Refused(f"{exc.code}: {exc}", sent)
    at = time.perf_counter()
    sent = Sent(at, (at - decided) * 1e3, len(payload), chosen.codec)
    remaining_s = times.due - at
    if remaining_s <= 0:
        late = f"{LinkTimeout.code}: the deadline passed while the features were coded"
        return Refused(late, sent._replace(bytes_up=0))
    resort = uplink.request(chosen, request_id, payload, remaining_s)
    try:
        answered = resort.answer(remaining_s, len(family.labels))
    except LinkError as exc:
        resort.abandon()
        story = f" ({resort.story})" if resort.story else ""
        return Refused(f"{exc.code}: {exc}{story}", sent)
    reply = answered.reply
    done = time.perf_counter()
    reason = reply.reason if reply.degraded else chosen.reason
    return Answer(
        label=family.labels[reply.label],
        index=reply.label,
        confidence=reply.confidence,
        tier=reply.tier,
        exit=reply.exit,
        degraded=reply.degraded,
        reason=f"{reason}; {resort.story}" if resort.story else reason,
        bytes_up=answered.bytes_up,
        bytes_down=answered.bytes_down,
        total_ms=(done - times.start) * 1e3,
        timings=Timings(
            (times.computed - times.start) * 1e3, sent.encode_ms, (done - sent.at) * 1e3, tuple(reply.hops)
        ),
        request_id=request_id.hex(),
        codec=sent.codec,
    )
