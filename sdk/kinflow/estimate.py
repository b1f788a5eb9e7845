"""What is known of the way to one node. Pure: times and sizes come in, nothing is looked up.

    time to a reply = round trip + bytes × s_per_byte + the node's queue + what the node takes

Small messages teach the round trip, large ones what a byte costs on top of it. Averages are exponentially
weighted as SRTT of RFC 6298; the spread is an empirical quantile of what the prediction missed lately.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct
from msgspec.structs import replace

# The weight of a new sample. RFC 6298 takes 1/8 for a sample per round trip; samples are rarer here.
SMOOTHING = 1 / 4
# Below this many bytes a message tells of the round trip, from there on of the throughput.
SMALL_BYTES = 512
# How many replies the spread is taken from, and the share of them that come in time.
WINDOW = 32
QUANTILE = 0.95
# Before the first reply: expect little of the way, the deadline still holds; but be patient with it.
FIRST_ROUND_TRIP_S = 0.005
FIRST_SPREAD_S = 0.1
# Requests that vanish are repeated: no way is so bad that it is expected to take forever.
MAX_LOSS = 0.9


class LinkEstimate(Struct, frozen=True):
    """What to expect of one node."""

    round_trip_s: float = FIRST_ROUND_TRIP_S
    """A small message's way there and back."""
    s_per_byte: float = 0.0
    """What each byte adds: the inverse of the throughput."""
    loss: float = 0.0
    """Share of the requests that got no answer at all, 0 to 1."""
    queue_s: float = 0.0
    """Queue delay that the node reported last."""
    service_s: float = 0.0
    """What the node takes besides its queue, tiers above it included."""
    spread_s: float = FIRST_SPREAD_S
    """How much later than expected the slowest twentieth comes."""

    def expected_s(self, size_bytes: float) -> float:
        """From sending a request of this size to its reply."""
        return self.round_trip_s + size_bytes * self.s_per_byte + self.queue_s + self.service_s

    def late_s(self, size_bytes: float) -> float:
        """By then 19 of 20 replies have come."""
        return self.expected_s(size_bytes) + self.spread_s

    def cost_s(self, size_bytes: float) -> float:
        """The expected time with the repeats that loss makes necessary: 1 / (1 - loss) attempts on average."""
        return self.expected_s(size_bytes) / (1 - min(self.loss, MAX_LOSS))


class Estimator:
    """Learns from every reply; `now` is the present LinkEstimate. Not for several threads at once."""

    def __init__(self) -> None:
        self.now = LinkEstimate()
        self._missed: deque[float] = deque(maxlen=WINDOW)
        self._heard = False
        self._way_known = False

    def replied(self, size_bytes: int, took_s: float, server_s: float, queue_s: float) -> None:
        """A reply came after `took_s`; the node says that `server_s` of it were its own, `queue_s` in its queue."""
        before = self.now
        service_s = max(0.0, server_s - queue_s)
        self._missed.append(took_s - queue_s - (before.expected_s(size_bytes) - before.queue_s))
        round_trip_s, s_per_byte = self._way(size_bytes, max(0.0, took_s - server_s))
        self.now = LinkEstimate(
            round_trip_s,
            s_per_byte,
            before.loss * (1 - SMOOTHING),
            queue_s,
            _towards(before.service_s, service_s) if self._heard else service_s,
            max(0.0, _quantile(self._missed)),
        )
        self._heard = True

    def echoed(self, size_bytes: int, took_s: float, queue_s: float) -> None:
        """A probe of this size came back: it did not queue and was not computed."""
        round_trip_s, s_per_byte = self._way(size_bytes, took_s)
        loss = self.now.loss * (1 - SMOOTHING)
        self.now = replace(self.now, round_trip_s=round_trip_s, s_per_byte=s_per_byte, loss=loss, queue_s=queue_s)

    def unanswered(self, size_bytes: int, waited_s: float) -> None:
        """Nothing came for `waited_s`: the request is lost, or it takes at least that long."""
        self.now = replace(self.now, loss=_towards(self.now.loss, 1.0))
        if waited_s > self.now.expected_s(size_bytes):
            way_s = max(0.0, waited_s - self.now.queue_s - self.now.service_s)
            round_trip_s, s_per_byte = self._way(size_bytes, way_s)
            self.now = replace(self.now, round_trip_s=round_trip_s, s_per_byte=s_per_byte)

    def reported(self, queue_s: float) -> None:
        """The node said how long its queue is: in its status, or being busy."""
        self.now = replace(self.now, queue_s=queue_s)

    def _way(self, size_bytes: int, way_s: float) -> tuple[float, float]:
        """Round trip and seconds per byte, after a message of this size took `way_s` there and back."""
        now = self.now
        if size_bytes < SMALL_BYTES:
            sample_s = max(0.0, way_s - size_bytes * now.s_per_byte)
            known, self._way_known = self._way_known, True
            return _towards(now.round_trip_s, sample_s) if known else sample_s, now.s_per_byte
        per_byte_s = max(0.0, way_s - now.round_trip_s) / size_bytes
        return now.round_trip_s, _towards(now.s_per_byte, per_byte_s)


def _towards(average: float, sample: float) -> float:
    return average + SMOOTHING * (sample - average)


def _quantile(missed: deque[float]) -> float:
    ordered = sorted(missed)
    return ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]
