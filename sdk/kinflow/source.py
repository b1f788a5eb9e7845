"""Where a bundle is pulled from: a server's files, read in parts over MQTT."""

from __future__ import annotations

import os
import queue
import time
from dataclasses import dataclass
from types import TracebackType

from kinflow import topics
from kinflow.errors import FamilyMismatch, FrameError, LinkError, LinkLost, LinkTimeout, ServerFailed
from kinflow.frame import Buffer, pack, unpack
from kinflow.link import MAX_NODES
from kinflow.messages import Busy, Failure, Fetch, Message, NodeStatus, Part, Tier
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.tls import Credentials

PART_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 5.0
PART_TIMEOUT_S = 5.0
ATTEMPTS = 6
MAX_PAUSE_S = 2.0
# Who waits so long without an answer looks whether there is anybody to give one.
LOOK_S = 0.5


@dataclass(frozen=True)
class Chunk:
    """One part of a file."""

    total_bytes: int
    """Size of the whole file."""
    data: bytes


class BundleSource:
    """The bundle of `family` at the servers of `tier` behind one broker. Use it with `with`."""

    def __init__(self, address: BrokerAddress, tier: Tier, family: str, *, tls: Credentials | None = None) -> None:
        client_id = f"pull-{os.urandom(6).hex()}"
        self.address = address
        self._family = family
        self._client = client_id if tls is None else str(tls.identity)
        self._topic = topics.bundle(tier, family, self._client)
        self._tier = tier
        self._nodes: dict[str, NodeStatus] = {}
        self._came: queue.SimpleQueue[tuple[Message, bytes]] = queue.SimpleQueue()
        self._connection = Connection(
            address,
            client_id,
            on_message=self._on_message,
            subscriptions=[topics.reply(self._client), topics.ALL_STATUS],
            tls=tls,
        )

    def __enter__(self) -> BundleSource:
        """Raises LinkLost when the broker cannot be reached."""
        self._connection.start()
        if not self._connection.wait_connected(CONNECT_TIMEOUT_S):
            self._connection.close()
            raise LinkLost(f"no connection to {self.address}: kinflow doctor says more")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def read(self, path: str, offset: int, length: int = PART_BYTES) -> Chunk:
        """At most `length` bytes from `offset` on. Raises LinkLost or LinkTimeout after several tries.

        ServerFailed at once: a server refuses, or those that are there do not serve this family.
        """
        error: LinkError = LinkTimeout(f"no server at {self.address} sent {path}")
        for attempt in range(ATTEMPTS):
            request = Fetch(os.urandom(16), self._client, self._family, path, offset, length)
            try:
                self._connection.publish(self._topic, pack(request))
                return self._wait(request)
            except ServerFailed:
                raise
            except LinkError as exc:
                error = exc
                time.sleep(min(0.1 * 2**attempt, MAX_PAUSE_S))
        raise error

    def _wait(self, request: Fetch) -> Chunk:
        until_s = time.monotonic() + PART_TIMEOUT_S
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                message, payload = self._came.get(timeout=min(left_s, LOOK_S))
            except queue.Empty:
                self._check_served()
                continue
            if getattr(message, "id", b"") != request.id:
                continue  # of an earlier attempt
            if isinstance(message, Part) and len(payload) <= request.length:
                return Chunk(message.total_bytes, payload)
            if isinstance(message, Busy):
                time.sleep(min(message.queue_ms / 1e3, PART_TIMEOUT_S))
                raise LinkTimeout(f"{message.node} was busy too often: try again later, what came is kept")
            if isinstance(message, Failure):
                raise ServerFailed(message.node, message.code, message.message)
        raise LinkTimeout(f"no server at {self.address} sent {request.path} within {PART_TIMEOUT_S:.0f} s")

    def _check_served(self) -> None:
        """Nobody answers: raises ServerFailed when there are servers, and none of them has the family."""
        nodes = [node for node in self._nodes.values() if node.tier == self._tier]
        served = {family.family for node in nodes for family in node.families}
        if served and self._family not in served:
            names = ", ".join(sorted(served))
            raise ServerFailed(nodes[0].node, FamilyMismatch.code, f"{names} is served here, not {self._family}")

    def _on_message(self, _topic: str, data: Buffer) -> None:
        if not data:
            return  # a node that is gone
        try:
            message, payload = unpack(data)
        except FrameError:
            return  # the attempt times out and is repeated
        if isinstance(message, NodeStatus):
            if message.node in self._nodes or len(self._nodes) < MAX_NODES:
                self._nodes[message.node] = message
        else:
            self._came.put((message, bytes(payload)))
