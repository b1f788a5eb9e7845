"""One node as its client sees it: the link that leads there, what is known of the way, and its breaker.

Every outcome of a request or a probe teaches both. For any thread.
"""

from __future__ import annotations

import math
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from kinflow.awaited import Answered, Echoed, R
from kinflow.breaker import Breaker
from kinflow.errors import (
    LinkError,
    LinkTimeout,
    RequestCancelled,
    ServerBusy,
    ServerFailed,
    SessionLimit,
    SessionLost,
    Superseded,
)
from kinflow.estimate import Estimator, LinkEstimate
from kinflow.frame import Buffer
from kinflow.link import Link
from kinflow.messages import NodeStatus, Reply, Request, Verdict, Verify
from kinflow.policy import HEADER_BYTES

PROBE_TIMEOUT_S = 1.0
# A node that was late, or did not answer at all, and is spared since, is probed as often as this. After so many echoes
# in a row it is as good as new: what its failures taught would keep it from being asked, and so from teaching better.
DOUBT_INTERVAL_S = 0.5
CLEARING_ECHOES = 3
# A link that even a status has not come through for so long is probed, and connected anew when that goes unanswered.
SILENT_S = 2.5
# Every other probe is as large as this, so that the throughput shows.
PROBE_BYTES = 2048
SESSION_CODES = (SessionLost.code, SessionLimit.code, Superseded.code)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One request at one node."""

    peer: Peer
    request_id: bytes
    future: Future[Answered[Reply]]
    late_s: float
    """When 19 of 20 replies would be here (time.monotonic())."""


class Peer:
    """`link` leads to the node's broker; the node is asked on topics of its own."""

    def __init__(self, node: str, link: Link) -> None:
        self.node = node
        self.link = link
        self.breaker = Breaker()
        self._estimator = Estimator()
        self._lock = threading.Lock()
        self._probe: Future[Echoed] | None = None
        self._probes = 0
        self._heard_s = -math.inf  # a new one is probed at once
        self._was_ready = False
        # How many echoes it still takes until the node is trusted as before.
        self._doubts = 0

    @property
    def estimate(self) -> LinkEstimate:
        return self._estimator.now

    @property
    def status(self) -> NodeStatus | None:
        """What it said last; None while the connection is down or it has said nothing."""
        return self.link.nodes.get(self.node)

    def said(self, status: NodeStatus) -> None:
        """Its status came."""
        with self._lock:
            self._estimator.reported(status.queue_ms / 1e3)
            ready = status.state == "ready"
            if ready and not self._was_ready:
                self.breaker = self.breaker.back(time.monotonic())
            self._was_ready = ready

    def lost(self) -> None:
        """The connection to its broker is down: its next status is a comeback."""
        self._was_ready = False

    def ask(self, topic: str, request: Request, payload: Buffer) -> Attempt:
        """Link.request, and learn from how it ends."""
        size_bytes = len(payload) + HEADER_BYTES
        late_s = self.estimate.late_s(size_bytes)
        sent_s = time.monotonic()
        future = self.link.request(topic, request, payload, repeat_after_s=late_s)
        future.add_done_callback(partial(self._learn, sent_s, size_bytes, late_s))
        return Attempt(self, request.id, future, sent_s + late_s)

    def verify(self, topic: str, verify: Verify, payload: Buffer) -> Future[Answered[Verdict]]:
        """Link.verify, and learn from how it ends."""
        size_bytes = len(payload) + HEADER_BYTES
        late_s = self.estimate.late_s(size_bytes)
        sent_s = time.monotonic()
        future = self.link.verify(topic, verify, payload, repeat_after_s=late_s)
        future.add_done_callback(partial(self._learn, sent_s, size_bytes, late_s))
        return future

    def probe_if_due(self, topic: str, now_s: float, idle_s: float) -> None:
        """When it is half-open, in doubt, silent, or was not heard of for `idle_s`; one probe at a time."""
        state = self.breaker.state(now_s)
        if self._doubts or now_s - self.link.heard_s > SILENT_S:
            idle_s = min(idle_s, DOUBT_INTERVAL_S)
        if self._probe is not None or state == "open" or (state == "closed" and now_s - self._heard_s < idle_s):
            return
        self._probes += 1
        self._probe = self.link.probe(topic, PROBE_BYTES * (self._probes % 2), PROBE_TIMEOUT_S)
        self._probe.add_done_callback(self._learn_from_probe)

    def _learn(self, sent_s: float, size_bytes: int, late_s: float, future: Future[Answered[R]]) -> None:
        now_s = time.monotonic()
        try:
            answered = future.result()
        except LinkError as error:
            with self._lock:
                self._learn_from_error(error, size_bytes, now_s - sent_s, late_s, now_s)
            return
        hops = answered.reply.hops
        server_s, queue_s = (hops[0].total_ms / 1e3, hops[0].queue_ms / 1e3) if hops else (0.0, 0.0)
        with self._lock:
            if answered.attempts == 1:  # else it is no sample: Karn's rule, RFC 6298
                self._estimator.replied(answered.bytes_up, answered.round_trip_s, server_s, queue_s)
                self._doubts = 0
            self._succeeded(now_s)

    def _learn_from_error(
        self, error: LinkError, size_bytes: int, waited_s: float, late_s: float, now_s: float
    ) -> None:
        if isinstance(error, ServerBusy):
            self._estimator.reported(error.queue_ms / 1e3)
            self._succeeded(now_s)
        elif isinstance(error, ServerFailed):
            if error.failure_code in SESSION_CODES:
                self._succeeded(now_s)  # nothing is wrong with the node
            else:
                self._failed(now_s)
        elif isinstance(error, (LinkTimeout, RequestCancelled)) and waited_s >= late_s:
            # One that had less time than its usual ones take has not failed.
            self._estimator.unanswered(size_bytes, waited_s)
            if isinstance(error, LinkTimeout):
                self._failed(now_s)
            else:  # somebody else was faster: it may be slow, and a probe tells whether it is mute
                self._doubts = CLEARING_ECHOES

    def _learn_from_probe(self, future: Future[Echoed]) -> None:
        now_s = time.monotonic()
        error = future.exception()
        with self._lock:
            self._probe = None
            self._heard_s = now_s  # also when it failed: the next one waits its turn
            if error is None:
                echoed = future.result()
                if self._cleared(now_s):
                    self._estimator = Estimator()  # what was learned while it failed says nothing about now
                self._estimator.echoed(echoed.bytes_up, echoed.round_trip_s, echoed.echo.queue_ms / 1e3)
                self._succeeded(now_s)
            elif isinstance(error, LinkTimeout):
                self._estimator.unanswered(HEADER_BYTES, PROBE_TIMEOUT_S)
                self._failed(now_s)
                if now_s - self.link.heard_s > SILENT_S:
                    self.link.connection.renew()  # half-open, perhaps: its keepalive would take twice as long
                    self._was_ready = False  # what it says on the new connection is news

    def _cleared(self, now_s: float) -> bool:
        """An echo came: whether it ends the doubts about the node."""
        if self.breaker.state(now_s) != "closed":
            self._doubts = 0
            return True
        if not self._doubts:
            return False
        self._doubts -= 1
        return not self._doubts

    def _succeeded(self, now_s: float) -> None:
        self._heard_s = now_s
        if self.breaker.failures:
            self.breaker = self.breaker.succeeded()

    def _failed(self, now_s: float) -> None:
        self._doubts = CLEARING_ECHOES
        self.breaker = self.breaker.failed(now_s, random.random())
