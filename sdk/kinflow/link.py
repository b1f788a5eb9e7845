"""MQTT request/reply over one Connection: correlation, deadline, retry.

Requests go out at QoS 0. One that waits is published again under the same id: when the connection came back,
and once on each connection when no reply came. Servers remember recent ids and answer a repeat from memory.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import MappingProxyType, TracebackType

import msgspec

from kinflow import topics
from kinflow.awaited import Answered, Awaited, Echoed
from kinflow.errors import (
    FrameError,
    LinkError,
    LinkLost,
    LinkTimeout,
    RequestCancelled,
    ServerBusy,
    ServerFailed,
    SettingsError,
)
from kinflow.frame import Buffer, parts, unpack
from kinflow.inflight import InFlight
from kinflow.messages import (
    Busy,
    Cancel,
    Echo,
    Failure,
    NodeStatus,
    Part,
    Probe,
    Release,
    Reply,
    Request,
    Verdict,
    Verify,
)
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.tls import Credentials

log = logging.getLogger("kinflow.link")

MAX_IN_FLIGHT = 256
# On a broker where anybody may write statuses they must not fill the memory.
MAX_NODES = 256


@dataclass
class LinkCounters:
    """What happened since the start."""

    answered: int = 0
    """Requests that got a Reply, Verdict, Busy or Failure, and probes that got their Echo."""
    timed_out: int = 0
    retried: int = 0
    """Attempts after a request's first."""
    unexpected: int = 0
    """Replies that no waiting request asked for: late, duplicate or foreign. Dropped."""
    malformed: int = 0
    """Messages that are no valid frame, or not what belongs on their topic. Dropped."""


class Link:
    """Requests to the servers behind one broker, and what those servers say of themselves.

    `client_id` must be unique at the broker. With `tls` requests carry that identity, otherwise the client id:
    `client` is what they carry. `on_status` is called for every status, on the network thread or
    on one that waits for a reply: it must be quick, and must neither wait for a reply nor close the link. At
    most `max_in_flight` requests wait at the same time.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_status: Callable[[NodeStatus], None] | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        keepalive_s: int = 5,
        tls: Credentials | None = None,
    ) -> None:
        if not client_id or any(sign in "+#/\0" for sign in client_id):
            raise SettingsError(f"client id {client_id!r} names a topic: at least one sign, none of + # /")
        self.client = client_id if tls is None else str(tls.identity)
        self._reply_topic = topics.reply(self.client)
        self._on_status = on_status
        self._nodes: dict[str, NodeStatus] = {}
        self._counters = LinkCounters()
        self.heard_s = time.monotonic()
        """When anything came last (time.monotonic())."""
        self.connection = Connection(
            address,
            client_id,
            on_message=self._on_message,
            subscriptions=(self._reply_topic, topics.ALL_STATUS),
            on_connected=self._on_connected,
            on_lost=self._on_lost,
            keepalive_s=keepalive_s,
            tls=tls,
        )
        self._in_flight = InFlight(max_in_flight, self.connection.call_at, self._on_silence)

    # Lifetime

    def start(self) -> None:
        """Connect in the background."""
        self.connection.start()

    def close(self) -> None:
        """Disconnect; requests that still wait fail with LinkLost."""
        self.connection.close()
        for future in self._in_flight.clear():
            future.set_exception(LinkLost("the link was closed"))

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
        return self.connection.address

    @property
    def connected(self) -> bool:
        return self.connection.connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected, at most `timeout_s`; whether it is."""
        return self.connection.wait_connected(timeout_s)

    @property
    def nodes(self) -> Mapping[str, NodeStatus]:
        """The last status of every node, also of those that are offline; a snapshot."""
        return MappingProxyType(self._nodes)

    @property
    def counters(self) -> LinkCounters:
        """A snapshot."""
        return replace(self._counters)

    # Requests

    def request(
        self, topic: str, request: Request, payload: Buffer, *, repeat_after_s: float = 0.0
    ) -> Future[Answered[Reply]]:
        """Publish, and finish the future when the reply comes or `request.deadline_ms` has passed.

        The future ends with Answered, LinkTimeout, LinkLost (also at once, when not connected), ServerBusy,
        ServerFailed, RequestCancelled, or LinkError when too many requests wait. Only `cancel` and its deadline
        end it before. Silence for `repeat_after_s`, or for a third of the deadline where that is more, makes it
        be published once again. Raises FrameError when request or payload are too large, LinkError on a
        foreign `client`.
        """
        return self._send(Awaited(self.connection, topic, request, payload, request.deadline_ms / 1e3, repeat_after_s))

    def verify(
        self, topic: str, verify: Verify, payload: Buffer, *, repeat_after_s: float = 0.0
    ) -> Future[Answered[Verdict]]:
        """As `request`, for a step of a session."""
        return self._send(Awaited(self.connection, topic, verify, payload, verify.deadline_ms / 1e3, repeat_after_s))

    def release(self, topic: str, session: bytes) -> None:
        """Tell a server that a session has ended. One that does not hear of it forgets the session when it idles."""
        try:
            self.connection.publish(topic, *parts(Release(os.urandom(16), self.client, session), b""))
        except LinkError as exc:
            log.debug("session %s: not released at its server: %s", session.hex(), exc)

    def probe(self, topic: str, size_bytes: int, timeout_s: float) -> Future[Echoed]:
        """Ask the node that listens on `topic` for an echo, with a payload of `size_bytes`. Ends as a request does."""
        probe = Probe(os.urandom(16), self.client)
        awaited = Awaited(self.connection, topic, probe, bytes(size_bytes), timeout_s, timeout_s)
        awaited.repeated = True  # a repeat would say nothing about the way
        return self._send(awaited)

    def cancel(self, request_id: bytes) -> None:
        """Give a request up and tell its server; nothing when it has ended. Its future ends with RequestCancelled."""
        future = self._in_flight.pop(request_id)
        if future is None:
            return
        try:
            self.connection.publish(future.topic, *parts(Cancel(request_id, self.client), b""))
        except LinkError as exc:
            log.debug("request %s: not cancelled at its server: %s", request_id.hex(), exc)
        future.set_exception(RequestCancelled(f"request {request_id.hex()} was cancelled"))

    def _send(self, future: Awaited) -> Awaited:
        if future.request.client != self.client:
            raise LinkError(f"request.client is {future.request.client!r}, this link is {self.client!r}")
        frame = parts(future.request, future.payload)
        try:
            if not self.connection.connected:
                raise LinkLost(f"not connected to {self.address}")
            self._in_flight.add(future)
        except LinkError as exc:
            future.set_exception(exc)
            return future
        try:
            self._publish(future, frame)
        except LinkError as exc:
            if self._in_flight.pop(future.request.id) is not None:
                future.set_exception(exc)
            return future
        self._in_flight.expect(future)
        return future

    def _publish(self, future: Awaited, frame: Sequence[Buffer]) -> None:
        # Counted before: the reply may be here before publish() returns.
        future.attempts += 1
        future.bytes_up += sum(map(len, frame))
        self.connection.publish(future.topic, *frame)

    def _publish_again(self, future: Awaited) -> None:
        left_ms = (future.deadline_s - time.monotonic()) * 1e3
        request = future.request
        if left_ms <= 0 or isinstance(request, Probe):
            return
        self._counters.retried += 1
        log.debug("request %s: attempt %d", request.id.hex(), future.attempts + 1)
        try:
            self._publish(future, parts(msgspec.structs.replace(request, deadline_ms=left_ms), future.payload))
        except LinkError as exc:
            log.debug("request %s: %s", future.request.id.hex(), exc)

    # Network thread: time passes

    def _on_silence(self, future: Awaited, now_s: float) -> None:
        request_id = future.request.id
        if now_s < future.deadline_s:
            future.due_s = future.deadline_s
            if not future.repeated and self.connected:
                future.repeated = True
                self._publish_again(future)
        elif self._in_flight.pop(request_id) is not None:
            self._counters.timed_out += 1
            log.debug("request %s: no reply in time, %d attempts", request_id.hex(), future.attempts)
            wanted = f"no reply on {future.topic} within {(future.deadline_s - future.sent_s) * 1e3:.0f} ms"
            lost = future.orphaned or not self.connected
            future.set_exception(LinkLost(f"{wanted}: the connection broke") if lost else LinkTimeout(wanted))

    # Network thread: the connection comes and goes

    def _on_lost(self) -> None:
        self._nodes = {}  # what is still there says so again, retained, once the connection is back
        self._in_flight.orphan()

    def _on_connected(self) -> None:
        for future in self._in_flight.orphans():
            future.orphaned = future.repeated = False
            self._publish_again(future)
            self._in_flight.expect(future)

    # The thread that reads: messages come in

    def _on_message(self, topic: str, data: memoryview) -> None:
        self.heard_s = time.monotonic()
        try:
            if topic == self._reply_topic:
                self._on_reply(data)
            else:
                self._on_node(topic, data)
        except FrameError as exc:
            self._counters.malformed += 1
            log.warning("message on %s dropped: %s", topic, exc)

    def _on_reply(self, data: Buffer) -> None:
        now_s = time.monotonic()
        message = unpack(data).message
        if isinstance(message, Part):
            return  # `kinflow pull` runs under this identity too
        if not isinstance(message, (Reply, Verdict, Busy, Failure, Echo)):
            raise FrameError(f"a {type(message).__name__} does not belong here")
        future = self._in_flight.get(message.id)
        if future is not None and isinstance(message, Reply if isinstance(future.request, Verify) else Verdict):
            raise FrameError(f"a {type(message).__name__} does not answer a {type(future.request).__name__}")
        future = self._in_flight.pop(message.id)
        if future is None:
            self._counters.unexpected += 1
            log.debug("request %s: late, duplicate or foreign reply dropped", message.id.hex())
            return
        self._counters.answered += 1
        if isinstance(message, (Reply, Verdict)):
            future.set_result(Answered(message, future.bytes_up, len(data), now_s - future.sent_s, future.attempts))
        elif isinstance(message, Echo):
            future.set_result(Echoed(message, future.bytes_up, now_s - future.sent_s))
        elif isinstance(message, Busy):
            future.set_exception(ServerBusy(message.node, message.queue_ms))
        else:
            future.set_exception(ServerFailed(message.node, message.code, message.message))

    def _on_node(self, topic: str, data: Buffer) -> None:
        node = topic.split("/")[-2]
        nodes = dict(self._nodes)  # replaced, never changed: `nodes` is read on other threads
        if not data:
            nodes.pop(node, None)
            self._nodes = nodes
            return
        if node not in nodes and len(nodes) >= MAX_NODES:
            raise FrameError(f"{MAX_NODES} nodes are known already")
        status = unpack(data).message
        if not isinstance(status, NodeStatus) or status.node != node:
            raise FrameError(f"not a status of {node!r}")
        nodes[node] = status
        self._nodes = nodes
        if self._on_status is not None:
            self._on_status(status)
