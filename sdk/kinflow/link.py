"""MQTT request/reply over one Connection: correlation, deadline, retry.

Requests go out at QoS 0. One that got no reply is published again under the same id: after the connection
came back, and once while it stands. Servers remember recent ids and answer a repeat from memory.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

import msgspec

from kinflow import topics
from kinflow.errors import (
    FrameError,
    LinkError,
    LinkLost,
    LinkTimeout,
    ServerBusy,
    ServerFailed,
    SettingsError,
)
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Failure, NodeStatus, Reply, Request
from kinflow.mqtt import BrokerAddress, Connection

log = logging.getLogger("kinflow.link")

MAX_IN_FLIGHT = 256
# The weight of a new sample in the smoothed round trip: alpha of RFC 6298, 2.3.
SMOOTHING = 1 / 8


@dataclass(frozen=True)
class Answered:
    """A reply and what it cost."""

    reply: Reply
    bytes_up: int
    """Whole MQTT payloads sent, of all attempts."""
    bytes_down: int
    """The MQTT payload of the reply."""
    round_trip_s: float
    """From the first attempt to the reply."""


@dataclass(frozen=True)
class LinkCounters:
    """What happened since the start."""

    answered: int = 0
    """Requests that got a Reply, Busy or Failure."""
    timed_out: int = 0
    retried: int = 0
    """Requests that were published again; each attempt counts."""
    unexpected: int = 0
    """Replies that no waiting request asked for: late, duplicate or foreign. Dropped."""
    malformed: int = 0
    """Messages that are no valid frame, or not what belongs on their topic. Dropped."""


class _Awaited(Future[Answered]):
    """A future whose waiter reads the socket itself meanwhile: no switch of threads when the reply comes."""

    def __init__(self, connection: Connection, deadline_s: float) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._connection = connection
        self._deadline_s = deadline_s

    def result(self, timeout: float | None = None) -> Answered:
        return super().result(self._drive(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._drive(timeout))

    def _drive(self, timeout_s: float | None) -> float | None:
        """What is left of the timeout afterwards."""
        if self.done():
            return timeout_s
        now_s = time.monotonic()
        until_s = self._deadline_s if timeout_s is None else min(now_s + timeout_s, self._deadline_s)
        self._connection.drive(self.done, until_s)
        return None if timeout_s is None else max(0.0, now_s + timeout_s - time.monotonic())


@dataclass(eq=False)
class _Pending:
    topic: str
    request: Request
    payload: bytes
    future: _Awaited
    sent_s: float
    deadline_s: float
    bytes_up: int
    attempts: int = 1
    orphaned: bool = False
    """Whether its connection was lost, and with it perhaps the request or the reply."""


class Link:
    """Requests to the servers behind one broker, and what those servers say of themselves.

    `client_id` must be unique at the broker. `on_status` is called for every status, on the network thread:
    it must be quick. At most `max_in_flight` requests wait at the same time.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_status: Callable[[NodeStatus], None] | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        keepalive_s: int = 5,
    ) -> None:
        if not client_id or any(sign in "+#/\0" for sign in client_id):
            raise SettingsError(f"client id {client_id!r} names a topic: at least one sign, without + # /")
        self.reply_topic = topics.reply(client_id)
        self._on_status = on_status
        self._max_in_flight = max_in_flight
        self._lock = threading.Lock()
        self._pending: dict[bytes, _Pending] = {}
        self._nodes: dict[str, NodeStatus] = {}
        self._counters = LinkCounters()
        self._round_trip_s: float | None = None
        self._connection = Connection(
            address,
            client_id,
            on_message=self._on_message,
            subscriptions=(self.reply_topic, topics.ALL_STATUS),
            on_connected=self._on_connected,
            on_lost=self._on_lost,
            keepalive_s=keepalive_s,
        )

    # Lifetime

    def start(self) -> None:
        """Connect in the background."""
        self._connection.start()

    def close(self) -> None:
        """Disconnect; requests that still wait fail with LinkLost."""
        self._connection.close()
        with self._lock:
            waiting = list(self._pending.values())
            self._pending.clear()
        for pending in waiting:
            pending.future.set_exception(LinkLost("the link was closed"))

    def __enter__(self) -> Link:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What is known

    @property
    def address(self) -> BrokerAddress:
        return self._connection.address

    @property
    def connected(self) -> bool:
        return self._connection.connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected, at most `timeout_s`; whether it is."""
        return self._connection.wait_connected(timeout_s)

    @property
    def nodes(self) -> Mapping[str, NodeStatus]:
        """The last status of every node, also of those that are offline; a snapshot."""
        return MappingProxyType(self._nodes)

    @property
    def counters(self) -> LinkCounters:
        return self._counters

    @property
    def round_trip_s(self) -> float | None:
        """Smoothed time from a request to its reply, less the first server's queue; None before the first.

        Exponentially weighted as SRTT of RFC 6298; a request that was repeated is no sample (Karn's rule,
        same RFC), since its reply may belong to either attempt.
        """
        return self._round_trip_s

    # Requests

    def request(self, topic: str, request: Request, payload: bytes) -> Future[Answered]:
        """Publish, and finish the future when the reply comes or `request.deadline_ms` has passed.

        The future ends with Answered, LinkTimeout, LinkLost (also at once, when not connected), ServerBusy,
        ServerFailed, or LinkError when too many requests wait. It cannot be cancelled: its deadline ends it.
        Raises FrameError when request or payload are too large, LinkError on a foreign `reply_to`.
        """
        if request.reply_to != self.reply_topic:
            raise LinkError(f"request.reply_to is {request.reply_to!r}, replies come to {self.reply_topic!r}")
        now_s = time.monotonic()
        frame = pack(request, payload)
        deadline_s = now_s + request.deadline_ms / 1e3
        future = _Awaited(self._connection, deadline_s)
        pending = _Pending(topic, request, payload, future, now_s, deadline_s, len(frame))
        if (refusal := self._remember(pending)) is not None:
            future.set_exception(refusal)
            return future
        try:
            self._connection.publish(topic, frame)
        except LinkError as exc:
            if self._forget(request.id) is not None:
                future.set_exception(exc)
            return future
        retry_s = now_s + max(3 * (self._round_trip_s or 0.0), request.deadline_ms / 3e3)
        if retry_s < deadline_s:
            self._connection.call_at(retry_s, functools.partial(self._on_silence, request.id))
        else:
            self._connection.call_at(deadline_s, functools.partial(self._on_deadline, request.id))
        return future

    def _remember(self, pending: _Pending) -> LinkError | None:
        if not self._connection.connected:
            return LinkLost(f"not connected to {self.address}")
        with self._lock:
            if len(self._pending) >= self._max_in_flight:
                return LinkError(
                    f"{len(self._pending)} requests are in flight, {self._max_in_flight} are allowed"
                )
            if pending.request.id in self._pending:
                return LinkError(f"request {pending.request.id.hex()} is in flight already")
            self._pending[pending.request.id] = pending
        return None

    def _forget(self, request_id: bytes) -> _Pending | None:
        with self._lock:
            return self._pending.pop(request_id, None)

    # Timers; they hold the id alone, so that a payload lives no longer than its request

    def _on_silence(self, request_id: bytes) -> None:
        pending = self._pending.get(request_id)
        if pending is not None:
            self._connection.call_at(pending.deadline_s, functools.partial(self._on_deadline, request_id))
            if pending.attempts == 1 and self.connected:
                self._publish_again(pending)

    def _on_deadline(self, request_id: bytes) -> None:
        pending = self._forget(request_id)
        if pending is None:
            return
        self._count("timed_out")
        waited_ms = (time.monotonic() - pending.sent_s) * 1e3
        log.debug("request %s: no reply after %.0f ms", request_id.hex(), waited_ms)
        if self.connected:
            pending.future.set_exception(
                LinkTimeout(f"no reply from {pending.topic} within {pending.request.deadline_ms:.0f} ms")
            )
        else:
            pending.future.set_exception(LinkLost(f"the connection to {self.address} broke while waiting"))

    def _publish_again(self, pending: _Pending) -> None:
        left_ms = (pending.deadline_s - time.monotonic()) * 1e3
        if left_ms <= 0:
            return
        frame = pack(msgspec.structs.replace(pending.request, deadline_ms=left_ms), pending.payload)
        pending.attempts += 1
        pending.bytes_up += len(frame)
        self._count("retried")
        log.debug("request %s: published again, attempt %d", pending.request.id.hex(), pending.attempts)
        try:
            self._connection.publish(pending.topic, frame)
        except LinkError as exc:
            log.debug("request %s: %s", pending.request.id.hex(), exc)

    # What comes in

    def _on_lost(self) -> None:
        with self._lock:
            for pending in self._pending.values():
                pending.orphaned = True

    def _on_connected(self) -> None:
        with self._lock:
            orphans = [pending for pending in self._pending.values() if pending.orphaned]
        for pending in orphans:
            pending.orphaned = False
            self._publish_again(pending)

    def _on_message(self, topic: str, data: bytes) -> None:
        try:
            if topic == self.reply_topic:
                self._on_reply(data)
            else:
                self._on_node(topic, data)
        except FrameError as exc:
            self._count("malformed")
            log.warning("message on %s dropped: %s", topic, exc)

    def _on_reply(self, data: bytes) -> None:
        now_s = time.monotonic()
        message = unpack(data).message
        if not isinstance(message, (Reply, Busy, Failure)):
            raise FrameError(f"a {type(message).__name__} does not belong here")
        pending = self._forget(message.id)
        if pending is None:
            self._count("unexpected")
            log.debug("request %s: late, duplicate or foreign reply dropped", message.id.hex())
            return
        self._count("answered")
        if isinstance(message, Reply):
            round_trip_s = now_s - pending.sent_s
            if pending.attempts == 1:
                self._smooth(round_trip_s - (message.hops[0].queue_ms / 1e3 if message.hops else 0.0))
            pending.future.set_result(Answered(message, pending.bytes_up, len(data), round_trip_s))
        elif isinstance(message, Busy):
            pending.future.set_exception(ServerBusy(message.node, message.queue_ms))
        else:
            pending.future.set_exception(ServerFailed(message.node, message.code, message.message))

    def _on_node(self, topic: str, data: bytes) -> None:
        node = topic.split("/")[-2]
        nodes = dict(self._nodes)  # replaced, never changed: `nodes` is read on other threads
        if not data:
            nodes.pop(node, None)
            self._nodes = nodes
            return
        status = unpack(data).message
        if not isinstance(status, NodeStatus) or status.node != node:
            raise FrameError(f"not a status of {node!r}")
        nodes[node] = status
        self._nodes = nodes
        if self._on_status is not None:
            self._on_status(status)

    def _smooth(self, sample_s: float) -> None:
        sample_s = max(sample_s, 0.0)
        before_s = self._round_trip_s
        self._round_trip_s = sample_s if before_s is None else before_s + SMOOTHING * (sample_s - before_s)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters = LinkCounters(
                **{**self._counters.__dict__, name: getattr(self._counters, name) + 1}
            )
