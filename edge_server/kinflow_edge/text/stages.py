"""What happens to one verification: begun, fed, ruled, perhaps redone or sent up, answered. The worker's thread alone.

begin ── feed ── rule ──────────────────────────── answer
           │       └─ too close, exact: redo ── rule ──┤
           └─ the way ends at a split: ask above ──────┤
                                         └─ own ── rule┘
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec
import numpy as np

from kinflow.awaited import Answered
from kinflow.errors import SessionLost, Superseded
from kinflow.messages import Cancel, Release, Tier, Verdict
from kinflow.text.manifest import IDS
from kinflow.text.sampling import Choice
from kinflow_edge.desk import Desk
from kinflow_edge.text import engine
from kinflow_edge.text.above import Above, Asked
from kinflow_edge.text.job import Feed, Job
from kinflow_edge.text.model import Array
from kinflow_edge.text.rule import Ruling, rule
from kinflow_edge.text.session import Said, Session
from kinflow_edge.text.store import Sessions
from kinflow_edge.text.turns import Turns

NOTHING_ABOVE = "no upstream is set"


class Stages:
    """Moves jobs on. `above` by family."""

    def __init__(
        self,
        tier: Tier,
        desk: Desk,
        sessions: Sessions,
        turns: Turns,
        above: Mapping[str, Above],
        ended: Callable[[Job], None],
    ) -> None:
        self._tier = tier
        self._desk = desk
        self._sessions = sessions
        self._turns = turns
        self._above = above
        self._ended = ended
        self._giving_up = False
        self.under_way: dict[tuple[str, bytes], Job] = {}
        """Begun and not answered, by client and request."""
        self.asked: dict[Job, Asked] = {}
        """Those of them that the tier above has."""
        self.redone = 0
        """Positions that were decided from token ids, where the coding of features could have decided them."""

    # Begin and end

    def begin(self, job: Job) -> None:
        """Raises KinflowError where it cannot be computed."""
        verify, now_s = job.verify, time.monotonic()
        self.under_way[verify.client, verify.id] = job
        if now_s > job.due_s:
            self.drop(job)
            return
        session = self._sessions.get(verify.family, verify.client, verify.session, now_s)
        if verify.follows is not None and (session is None or (session.job is None and not session.goes_on_with(job))):
            # Before the job has the session: what is refused changes nothing.
            raise Superseded(f"the text went on otherwise before position {verify.start}")
        if session is None and verify.start > 0:
            raise SessionLost(f"no such session is here, and the request begins at {verify.start}")
        if session is None:
            session, gone = self._sessions.open(job.model, verify.client, verify.session, now_s, bounded=not job.test)
            self.forget(gone)
        if session.job is not None:
            session.waiting.append(job)
            return
        job.session, session.job = session, job
        if not job.test:
            self.forget(self._sessions.reserve(session, job.end - session.length, now_s))
        session.begin(job)
        job.begun_s = time.monotonic()
        if job.way.path:
            inputs = job.tokens if job.features is None else job.features
            self._feed(job, Feed(job.way.path, session.caches, inputs))
        else:
            assert job.features is not None
            self._send_up(job, job.features)

    def drop(self, job: Job) -> None:
        """Its deadline has passed."""
        self._desk.expired(job.verify)
        self.undo(job)

    def undo(self, job: Job) -> None:
        """It gets no verdict: the session is as far as before it."""
        if job.session is not None:
            job.session.crop(job.verify.start)
        self._end(job)

    def _answer(self, job: Job, verdict: Verdict, said: Said | None) -> None:
        session = job.session
        assert session is not None
        session.crop(job.verify.confirmed + verdict.accepted)
        session.said = said
        session.used_s = time.monotonic()
        self._end(job)
        self._desk.answer(job.verify, verdict, job.arrived_s)

    def _end(self, job: Job) -> None:
        if self.under_way.pop((job.verify.client, job.verify.id), None) is None:
            return
        self._ended(job)
        session = job.session
        if session is None:
            return
        session.job = None
        if session.length == 0:
            self._sessions.close(session.model.family.id, session.client, session.id)
        if session.closed and session.above is not None:
            self.forget([session])
        while session.waiting and session.job is None:
            job = session.waiting.popleft()
            self._desk.guarded(job.verify, partial(self.begin, job), partial(self.undo, job))

    def cancel(self, cancel: Cancel) -> None:
        """Only its own client's request; what was computed of it is undone."""
        job = self.under_way.get((cancel.client, cancel.id))
        if job is None:
            return
        self._turns.remove(cancel.client, lambda other: other is job)
        if (asked := self.asked.pop(job, None)) is not None:
            asked.abandon()
        if job.session is None:
            session = self._sessions.get(job.verify.family, cancel.client, job.verify.session, time.monotonic())
            if session is not None and job in session.waiting:
                session.waiting.remove(job)
        self._desk.cancelled(cancel.client, cancel.id)
        self.undo(job)

    def release(self, family: str, release: Release) -> None:
        """Only its own client's session."""
        session = self._sessions.close(family, release.client, release.session)
        if session is not None and session.job is None:
            self.forget([session])

    def forget(self, gone: Sequence[Session]) -> None:
        """These are not held any more: nor need the tier above hold them."""
        for session in gone:
            if session.above is not None:
                self._above[session.model.family.id].release(session.above)
                session.above = None

    # Feed and rule

    def passed(self, batch: Sequence[Job], began_s: float) -> None:
        """A pass is over. Those that are through go on: the head says what they mean. Raises BackendError."""
        ruled: list[tuple[Job, Array]] = []
        up: list[tuple[Job, Array]] = []
        for job in batch:
            job.left = job.feeding.left
            if job.left:
                self._turns.put(job)
            elif job.stage == "verify" and job.way.split:
                up.append((job, job.fed().outputs))
            else:
                # The output of a position says what comes at the next one; what is known already need not be said.
                asked = job.end - max(job.verify.confirmed, job.verify.start + 1) + 1
                ruled.append((job, job.fed().outputs[-asked:] if asked else job.fed().outputs[:0]))
        logits = engine.logits(batch[0].model, [normed for _, normed in ruled]) if ruled else []
        for job in batch:
            job.compute_s += time.monotonic() - began_s
        for (job, _), rows in zip(ruled, logits, strict=True):
            self._desk.guarded(job.verify, partial(self._rule, job, rows), partial(self.undo, job))
        for job, outputs in up:
            self._desk.guarded(job.verify, partial(self._send_up, job, outputs), partial(self.undo, job))

    def _feed(self, job: Job, feed: Feed) -> None:
        job.feed, job.left = feed, feed.left
        self._turns.put(job)

    def _rule(self, job: Job, logits: Array) -> None:
        session, verify = job.session, job.verify
        assert session is not None
        coded = verify.exact and verify.split != IDS and job.stage == "verify"
        bound = job.model.family.manifest.margin_bound if coded else 0.0
        ruling = rule(job.drafts, verify.confirmed, logits, job.sampling, session.recall(job), bound)
        if ruling.doubtful:
            if IDS in job.model.sources:
                self._redo(job, session)
                return
            job.why = "what is close cannot be redone from token ids here"
        if job.stage == "redo":
            job.redone = len(ruling.choices)
            self.redone += job.redone
        self._say(job, ruling)

    def _redo(self, job: Job, session: Session) -> None:
        """Decide all of it from token ids."""
        job.stage = "redo"
        held = session.open_shadow()
        self.forget(self._sessions.reserve(session, job.end - held, time.monotonic()))
        path = job.model.family.manifest.exits[job.way.exit].segments
        self._feed(job, Feed(path, session.shadow, session.tokens[held:]))

    def _say(self, job: Job, ruling: Ruling) -> None:
        """With what was computed here."""
        exit_name = job.way.exit or job.model.exit
        last = ruling.choices[-1]
        degraded = bool(job.why)
        position = job.verify.confirmed + ruling.accepted
        said = Said(position, job.sampling, exit_name, last)
        verdict = Verdict(
            id=job.verify.id,
            accepted=ruling.accepted,
            token=last.token,
            probabilities=[choice.probability for choice in ruling.choices],
            tier=self._tier,
            exit=exit_name,
            node=self._desk.node,
            redone=job.redone,
            degraded=degraded,
            reason=job.why[:512],
            hops=[job.hop(self._desk.node, self._tier)],
            layer_tokens=job.layer_tokens,
            passes=job.passes,
        )
        self._answer(job, verdict, said)

    # Above, and without it

    def _send_up(self, job: Job, features: Array) -> None:
        session = job.session
        assert session is not None
        session.features = np.concatenate([session.features, features])
        above = self._above.get(job.model.family.id)
        if job.test or above is None:
            self._own(job, session, "" if job.test else NOTHING_ABOVE)
            return
        self._ask(above, Asked(job, session, self._reserve_s(job, session)))

    def _reserve_s(self, job: Job, session: Session) -> float:
        """Time to decide here, should no verdict come: a guess, so neither nothing nor most of what is left."""
        behind = job.end - self._own_held(job, session)
        layers = job.model.layers(job.model.own_way(job.way.split)) / max(1, job.model.layers(job.way.path))
        left_s = job.due_s - time.monotonic()
        return min(max(self._turns.wait_s(behind) * layers, left_s / 8), left_s / 2)

    def _ask(self, above: Above, asked: Asked) -> None:
        why = "this server is about to stop" if self._giving_up else above.ask(asked)
        if why:
            self._own(asked.job, asked.session, why)
        else:
            self._desk.counts["escalated"] += 1
            self.asked[asked.job] = asked

    def came_back(self, asked: Asked, done: Future[Answered[Verdict]]) -> None:
        """The tier above answered, or did not."""
        job = asked.job
        if self.asked.pop(job, None) is None:
            return  # cancelled
        above = self._above[job.model.family.id]
        verdict = above.verdict(asked, done)
        if verdict is None:
            self._ask(above, asked)
            return
        position = job.verify.confirmed + verdict.accepted
        said = Said(position, job.sampling, verdict.exit, Choice(verdict.token, verdict.probabilities[-1], math.inf))
        passed_down = msgspec.structs.replace(
            verdict,
            id=job.verify.id,
            hops=[job.hop(self._desk.node, self._tier), *verdict.hops],
            layer_tokens=job.layer_tokens + verdict.layer_tokens,
            passes=job.passes + verdict.passes,
        )
        self._answer(job, passed_down, said)

    def look_after(self, now_s: float) -> None:
        """Forget what has idled, give up whom was asked and is gone."""
        self.forget(self._sessions.expire(now_s))
        for asked in list(self.asked.values()):
            if asked.gone:
                asked.abandon()

    def give_up_above(self) -> None:
        """Nobody there is waited for any more, or asked."""
        self._giving_up = True
        for asked in list(self.asked.values()):
            asked.abandon()

    def _own(self, job: Job, session: Session, why: str) -> None:
        """This member's own exit decides; its branch has not seen what the tier above decided until now."""
        job.stage, job.why = "own", why
        path, held = job.model.own_way(job.way.split), self._own_held(job, session)
        for name in path:
            session.caches[name].crop(held)
        self._feed(job, Feed(path, session.caches, session.features[held:]))

    def _own_held(self, job: Job, session: Session) -> int:
        return min(session.caches[name].length for name in job.model.own_way(job.way.split))
