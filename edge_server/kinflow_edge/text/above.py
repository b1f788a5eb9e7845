"""The tier above, asked for one session: an edge server is its client, with sessions of its own there.

A session stays with the node that holds its cache. Another node is brought up to date in one request: the features of
all positions are kept here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from kinflow import topics
from kinflow.awaited import Answered
from kinflow.errors import LinkError, ServerFailed, SessionLost
from kinflow.messages import Verdict, Verify
from kinflow.peer import Peer
from kinflow.policy import NoRoute, Rate
from kinflow.uplink import Uplink
from kinflow_edge.text.job import Job
from kinflow_edge.text.model import ID_BYTES, ServedText
from kinflow_edge.text.session import Session


@dataclass
class Held:
    """What a node above has of a session."""

    node: str
    split: str
    id: bytes = field(default_factory=lambda: os.urandom(16))
    positions: int = 0


@dataclass(eq=False)
class Asked:
    """One job at the tier above."""

    job: Job
    session: Session
    reserve_s: float
    tried: set[str] = field(default_factory=set)
    """Nodes that did not answer."""
    reopened: bool = False
    why: str = "no other server is above"
    """What went wrong last."""
    peer: Peer | None = None
    request_id: bytes = b""

    @property
    def gone(self) -> bool:
        """The node that was asked says no more that it is there."""
        status = None if self.peer is None else self.peer.status
        return status is None or status.state == "offline"

    def abandon(self) -> None:
        """The verdict is not wanted, or will not come: the future ends."""
        if self.peer is not None:
            self.peer.link.cancel(self.request_id)


class Above:
    """Asks for one family. `came_back` gets what was asked and how it ended, on a network thread."""

    def __init__(
        self, model: ServedText, uplink: Uplink, came_back: Callable[[Asked, Future[Answered[Verdict]]], None]
    ) -> None:
        self._model = model
        self._uplink = uplink
        self._came_back = came_back

    def ask(self, asked: Asked) -> str:
        """Send what the node does not have yet; why that is not possible, else nothing."""
        job, session = asked.job, asked.session
        left_s = job.due_s - time.monotonic() - asked.reserve_s
        if left_s <= 0:
            return "no time is left to ask above" if asked.peer is None else asked.why
        codec = self._codec(job)
        rate = Rate(codec, ID_BYTES + self._model.family.codec(job.way.split, codec).token_bytes)
        routes = self._uplink.routes(job.way.split, [rate])
        if isinstance(routes, NoRoute):
            return routes.reason
        nodes = [route.node for route in routes if route.node not in asked.tried]
        if not nodes:
            return asked.why
        held = self._held(session, job.way.split, nodes)
        peer = self._uplink.peer(held.node)
        if peer is None:
            asked.tried.add(held.node)
            asked.why = f"{held.node} is gone"
            return self.ask(asked)
        start = min(held.positions, job.verify.start)
        verify = self._verify(job, peer, held, start, codec, left_s)
        coded = self._model.family.codec(job.way.split, codec).encode(session.features[start:])
        payload = session.tokens[start:].astype("<u4").tobytes() + coded
        asked.peer, asked.request_id = peer, verify.id
        topic = topics.request_to(held.node, verify.family, verify.split, verify.client)
        job.bytes_up += len(payload)
        future = peer.verify(topic, verify, payload)
        future.add_done_callback(lambda done: self._came_back(asked, done))
        return ""

    def verdict(self, asked: Asked, done: Future[Answered[Verdict]]) -> Verdict | None:
        """What came back. None: it is of no use, and may be asked for again."""
        session = asked.session
        try:
            verdict = done.result().reply
            _check(asked.job, verdict)
        except LinkError as exc:
            asked.why = f"{exc.code}: {exc}"
            assert session.above is not None
            if isinstance(exc, ServerFailed) and exc.failure_code == SessionLost.code and not asked.reopened:
                asked.reopened = True  # it is well, it only forgot
            else:
                asked.tried.add(session.above.node)
                self.release(session.above)
            session.above = None
            return None
        if session.above is not None:
            session.above.positions = asked.job.verify.confirmed + verdict.accepted
        return verdict

    def release(self, held: Held) -> None:
        """The session has ended."""
        peer = self._uplink.peer(held.node)
        if peer is not None:
            topic = topics.request_to(held.node, self._model.family.id, held.split, peer.link.client)
            peer.link.release(topic, held.id)

    def _held(self, session: Session, split: str, nodes: list[str]) -> Held:
        held = session.above
        if held is not None and (held.node not in nodes or held.split != split):
            self.release(held)
            held = None
        if held is None:
            held = session.above = Held(nodes[0], split)
        return held

    def _codec(self, job: Job) -> str:
        """As it came in, where the split has it; else the split's default."""
        codecs = self._model.family.manifest.splits[job.way.split].codecs
        return job.verify.codec if job.verify.codec in codecs else next(iter(codecs))

    def _verify(self, job: Job, peer: Peer, held: Held, start: int, codec: str, left_s: float) -> Verify:
        asked = job.verify
        return Verify(
            id=os.urandom(16),
            client=peer.link.client,
            family=asked.family,
            version=asked.version,
            split=job.way.split,
            codec=codec,
            session=held.id,
            start=start,
            confirmed=asked.confirmed,
            count=job.end - start,
            exit=asked.exit,
            exact=asked.exact,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            deadline_ms=left_s * 1e3,
        )


def _check(job: Job, verdict: Verdict) -> None:
    """Raises LinkError when a server says what cannot be."""
    drafts = len(job.drafts)
    if verdict.accepted > drafts or len(verdict.probabilities) != verdict.accepted + 1:
        raise LinkError(f"{verdict.node} accepted {verdict.accepted} of {drafts} drafts: impossible")
    if verdict.token >= job.model.family.manifest.vocabulary:
        raise LinkError(f"{verdict.node} says token {verdict.token}, which does not exist")
