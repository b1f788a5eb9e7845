"""The verifier above: one generation's session at one server, and at another when that one fails.

The device keeps the coded features of every position, so a new server is brought up to date in one request.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import numpy as np

from kinflow import topics
from kinflow.awaited import Answered
from kinflow.errors import LinkError, LinkLost, LinkTimeout, ServerFailed, SessionLost, Superseded
from kinflow.messages import Verdict, Verify
from kinflow.policy import NoRoute, Rate, Route
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.sampling import Sampling
from kinflow.uplink import Uplink

# A token's id, beside its features.
ID_BYTES = 4
# A prompt takes longer than a few drafts: this many positions may take the time of one deadline more.
POSITIONS_PER_DEADLINE = 64
# How often to look whether the server is still there while it computes.
LOOK_S = 0.1


@dataclass(frozen=True)
class Way:
    """How features travel."""

    split: str
    codec: str


@dataclass
class Sent:
    """A verification under way."""

    node: str
    future: Future[Answered[Verdict]]
    count: int
    """Positions sent."""
    confirmed: int
    end: int
    """Drafts are the positions from `confirmed` to `end`."""
    deadline_s: float
    """time.monotonic()"""
    payload_bytes: int


class Positions:
    """Every position's token and coded features, as far as the device has computed them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._coded: list[bytes] = []

    def add(self, tokens: Sequence[int], coded: bytes) -> None:
        """`coded` has equally many bytes for each token; empty where only ids travel."""
        size = len(coded) // len(tokens)
        self.tokens += tokens
        self._coded += [coded[at * size : (at + 1) * size] for at in range(len(tokens))]

    def crop(self, length: int) -> None:
        del self.tokens[length:], self._coded[length:]

    def digest(self, end: int) -> int:
        """CRC-32 of the token ids before `end`."""
        return zlib.crc32(np.array(self.tokens[:end], "<u4").tobytes())

    def payload(self, start: int, end: int) -> bytes:
        return np.array(self.tokens[start:end], "<u4").tobytes() + b"".join(self._coded[start:end])


class Remote:
    """Asks servers to verify. Not for several threads at once."""

    def __init__(
        self,
        family: TextFamily,
        uplink: Uplink,
        way: Way,
        sampling: Sampling,
        positions: Positions,
        *,
        exact: bool,
        deadline_s: float,
    ) -> None:
        self._family = family
        self._uplink = uplink
        self._sampling = sampling
        self._positions = positions
        self._exact = exact
        self._deadline_s = deadline_s
        self._exit = family.manifest.last_exit()
        self._session = os.urandom(16)
        self._node = ""
        self._held = 0
        """Positions that the server has."""
        self.way = way

    @property
    def node(self) -> str:
        """The server that holds the session; empty without one."""
        return self._node

    @property
    def held(self) -> int:
        """Positions that the server has for certain."""
        return self._held

    def route(self, avoided: Collection[str] = ()) -> Route | NoRoute:
        """To the server that holds the session while it can be asked, else to the best other one."""
        size = 0 if self.way.codec == IDS else self._family.codec(self.way.split, self.way.codec).token_bytes
        routes = self._uplink.routes(self.way.split, [Rate(self.way.codec, size + ID_BYTES)])
        if isinstance(routes, NoRoute):
            return routes
        left = [route for route in routes if route.node not in avoided]
        if not left:
            return NoRoute(f"{', '.join(avoided)} did not answer, and there is no other")
        return next((route for route in left if route.node == self._node), left[0])

    def wait(self, timeout_s: float) -> bool:
        """Whether a server can be asked, at once or before `timeout_s` are over."""
        return self._uplink.wait(self.way.split, [Rate(self.way.codec, 0)], timeout_s)

    def send(self, route: Route, confirmed: int, after: Sent | None = None) -> Sent:
        """Everything that the server does not have yet; tokens from position `confirmed` on are drafts.

        `after`: the last one under way, to the same server; then all that was drafted since, should its drafts stand.
        """
        if route.node != self._node:
            self._leave()
            self._node, self._held, self._session = route.node, 0, os.urandom(16)
        start = self._held if after is None else after.end
        confirmed = confirmed if after is None else after.end
        end = len(self._positions.tokens)
        count = end - start
        timeout_s = self._deadline_s * (1 + count / POSITIONS_PER_DEADLINE)
        deadline_s = time.monotonic() + timeout_s
        payload = self._positions.payload(start, end)
        peer = self._uplink.peer(route.node)
        if peer is None:
            lost: Future[Answered[Verdict]] = Future()
            lost.set_exception(LinkLost(f"{route.node} is gone"))
            return Sent(route.node, lost, count, confirmed, end, deadline_s, len(payload))
        verify = Verify(
            id=os.urandom(16),
            client=peer.link.client,
            family=self._family.id,
            version=self._family.version,
            split=self.way.split,
            codec=self.way.codec,
            session=self._session,
            start=start,
            confirmed=confirmed,
            count=count,
            exit=self._exit,
            exact=self._exact,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=self._sampling.seed,
            deadline_ms=timeout_s * 1e3,
            follows=None if after is None else self._positions.digest(start),
        )
        topic = topics.request_to(route.node, self._family.id, self.way.split, peer.link.client)
        future = peer.verify(topic, verify, payload)
        return Sent(route.node, future, count, confirmed, end, deadline_s, len(payload))

    def result(self, sent: Sent) -> Answered[Verdict]:
        """Waits. Raises LinkError; then the session at that server is given up, unless it was superseded."""
        try:
            answered = self._wait(sent)
            _check(answered.reply, sent, self._family.manifest.vocabulary)
        except LinkError as exc:
            if not superseded(exc):
                self._leave()
            raise
        self._held = sent.confirmed + answered.reply.accepted
        return answered

    def _wait(self, sent: Sent) -> Answered[Verdict]:
        """Not until the deadline where the node is known to be gone."""
        while True:
            left_s = sent.deadline_s - time.monotonic()
            try:
                return sent.future.result(min(max(left_s, 0.0), LOOK_S))
            except FutureTimeoutError as exc:
                peer = self._uplink.peer(sent.node)
                if left_s <= 0:
                    raise LinkTimeout(f"{sent.node} did not answer in time") from exc
                if peer is None or peer.status is None or peer.status.state in ("offline", "failing"):
                    raise LinkLost(f"{sent.node} is gone") from exc

    def close(self) -> None:
        """Tell the server that the session has ended."""
        self._leave()

    def _leave(self) -> None:
        if not self._node:
            return
        peer = self._uplink.peer(self._node)
        if peer is not None:
            topic = topics.request_to(self._node, self._family.id, self.way.split, peer.link.client)
            peer.link.release(topic, self._session)
        self._node, self._held = "", 0


def forgot(error: LinkError) -> bool:
    """The server is well, it only lost the session: it may be asked again at once."""
    return isinstance(error, ServerFailed) and error.failure_code == SessionLost.code


def superseded(error: LinkError) -> bool:
    """It followed what did not end as it had thought; the server has the session still."""
    return isinstance(error, ServerFailed) and error.failure_code == Superseded.code


def _check(verdict: Verdict, sent: Sent, vocabulary: int) -> None:
    """Raises LinkError when a server says what cannot be."""
    if verdict.accepted > sent.end - sent.confirmed or verdict.token >= vocabulary:
        raise LinkError(f"{verdict.node} accepted {verdict.accepted} drafts and says token {verdict.token}: impossible")
    if len(verdict.probabilities) != verdict.accepted + 1:
        raise LinkError(f"{verdict.node} gave {len(verdict.probabilities)} probabilities, not {verdict.accepted + 1}")
