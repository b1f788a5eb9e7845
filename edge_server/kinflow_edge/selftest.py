"""Readiness: a real inference of each family, through the broker and back, again and again.

An open port says little. What is tested is all that a device needs: broker, subscription, codec, graph, reply.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future

import msgspec

from kinflow import topics
from kinflow.address import BrokerAddress
from kinflow.awaited import Answered
from kinflow.errors import LinkError, ServerBusy
from kinflow.link import Link
from kinflow.messages import Reply, Verdict, Verify
from kinflow.tls import Credentials
from kinflow_edge.model import ServedFamily
from kinflow_edge.text.model import ServedText

INTERVAL_S = 5.0
TIMEOUT_S = 5.0
# What failed is tested again sooner, and before the other families: is it over, or is it so?
AGAIN_S = 0.5
# One may be lost with a connection that is just being replaced.
FAILING_AFTER = 2


class SelfTest:
    """Asks `node` as a device would, under the name `client`. `start`, then `step` now and then; then `close`."""

    def __init__(
        self,
        node: str,
        models: Mapping[str, ServedFamily | ServedText],
        address: BrokerAddress,
        client: str,
        tls: Credentials | None = None,
    ) -> None:
        self._node = node
        self._tests = [model.test_request() for model in models.values()]
        # The identity is no client id: the server's other connections have the same one.
        self._link = Link(address, client if tls is None else f"test-{os.urandom(6).hex()}", tls=tls)
        self._next = 0
        self._at_s = 0.0
        self._pending: Future[Answered[Reply]] | Future[Answered[Verdict]] | None = None
        self._failures = 0
        self._error = "no test inference has succeeded yet"

    @property
    def trouble(self) -> str:
        """Why the server is not ready; empty when it is."""
        return self._error if self._failures >= FAILING_AFTER or not self._at_s else ""

    def start(self) -> None:
        """Connect, and test every family once. Raises LinkError when that does not succeed."""
        self._link.start()
        if not self._link.wait_connected(TIMEOUT_S):
            raise LinkError(f"the broker at {self._link.address} does not answer")
        for _ in self._tests:
            self._send().result()
        self._at_s = time.monotonic() + INTERVAL_S

    def close(self) -> None:
        self._link.close()

    def step(self, now_s: float) -> None:
        """Take the result of a test that has ended, send the next one when it is due. Does not wait."""
        if self._pending is None and now_s >= self._at_s:
            self._at_s = now_s + INTERVAL_S
            self._pending = self._send()
        if self._pending is None or not self._pending.done():
            return
        error = self._pending.exception()
        self._pending = None
        if error is None:
            self._failures = 0
        elif not isinstance(error, ServerBusy):  # a long queue is no failure
            self._failures += 1
            self._next -= 1
            self._at_s = min(self._at_s, now_s + AGAIN_S)
            self._error = f"its own test inference fails: {error}"

    def _send(self) -> Future[Answered[Reply]] | Future[Answered[Verdict]]:
        asked, payload = self._tests[self._next % len(self._tests)]
        self._next += 1
        asked = msgspec.structs.replace(asked, id=os.urandom(16), client=self._link.client, deadline_ms=TIMEOUT_S * 1e3)
        topic = topics.request_to(self._node, asked.family, asked.split, asked.client)
        if isinstance(asked, Verify):
            return self._link.verify(topic, asked, payload)
        return self._link.request(topic, asked, payload)
