"""One generated text: drafts on the device, verdicts from above, tokens out as they are certain."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from math import prod
from typing import NamedTuple

from kinflow.awaited import Answered
from kinflow.errors import InputError, LinkError
from kinflow.messages import Tier, Verdict
from kinflow.policy import HEADER_BYTES, NoRoute, Route
from kinflow.text.codec import FeatureCodec
from kinflow.text.draft import Acceptance, Moment, Pace, Plan
from kinflow.text.drafter import Drafter
from kinflow.text.drafting import Draft, Drafting
from kinflow.text.manifest import Exit
from kinflow.text.remote import ID_BYTES, Positions, Remote, Sent, forgot, superseded
from kinflow.text.sampling import Sampling
from kinflow.text.summary import Mode, Summary, Token
from kinflow.text.tokenizer import Stream, Tokenizer

# Positions of a verification from which nothing is learned about the usual pace: a prompt's.
USUAL_POSITIONS = 64
# Others that wait for the server, as a share of a pass: fewer and longer verifications leave it more time.
OTHERS = 3.0
# How long a text waits when its last server is gone, before the device goes on alone.
PATIENCE_S = 2.0


class Limits(NamedTuple):
    """How long a text may get, and how far it is drafted."""

    max_tokens: int
    context: int
    draft_floor: float
    max_drafts: int


class Generation:
    """Iterate over it for the tokens; `summary` is there all the time. Made by TextDevice.generate."""

    def __init__(
        self,
        mode: Mode,
        prompt: Sequence[int],
        sampling: Sampling,
        limits: Limits,
        drafter: Drafter,
        exit_spec: Exit,
        codec: FeatureCodec | None,
        tokenizer: Tokenizer,
        positions: Positions,
        remote: Remote | NoRoute,
        acceptance: Acceptance,
        pace: Pace,
    ) -> None:
        """`codec`: of the features; None where only ids travel. `remote`: NoRoute where nobody is to be asked."""
        self.summary = Summary(mode, len(prompt))
        self._prompt = list(prompt)
        self._limits = limits
        self._drafting = Drafting(drafter, codec, positions, sampling, exit_spec.temperature, pace)
        self._certificate = exit_spec.certificate
        self._token_bytes = ID_BYTES + (codec.token_bytes if codec else 0)
        self._remote = remote
        self._acceptance = acceptance
        self._pace = pace
        self._stop = tokenizer.stop_tokens
        self._stream = Stream(tokenizer)
        self._flight: deque[Sent] = deque()
        """Verifications under way, the oldest first. Each begins where the one before it ends."""
        self._confirmed = 0
        """Positions whose token is certain; the device may not have computed the last one yet."""
        self._tried: list[str] = []
        """Servers that did not answer this round."""
        self._waited = False
        """It has waited for a server in vain, or for one that failed: it does not again until one answers."""
        self._began_s = 0.0

    def __iter__(self) -> Generator[Token, None, None]:
        """Once. Whoever leaves it early closes it, and with it the session at the server.

        Raises BackendError when the device's own graph fails; trouble above never raises.
        """
        if self._began_s:
            raise InputError("a Generation is iterated over once: generate the text again")
        self._began_s = time.perf_counter()
        try:
            self._drafting.begin(self._prompt)
            self._confirmed = len(self._prompt)
            while not self.summary.finish:
                yield from self._confident() if self.summary.mode == "confident" else self._round()
        finally:
            self._discard()
            self.forget_session()

    def forget_session(self) -> None:
        """Free what the server keeps for this text. Its next token, if there is one, brings it up to date again."""
        if isinstance(self._remote, Remote):
            self._remote.close()

    @property
    def _left(self) -> int:
        """Tokens that may still come."""
        most = min(self._limits.max_tokens, self._limits.context - len(self._prompt))
        return most - self.summary.count

    # One round

    def _round(self) -> Iterator[Token]:
        """One verdict; more drafts go up until it is there."""
        route = self._route() if not self._flight else self._way_on()
        if isinstance(route, NoRoute) and not self._flight:
            yield from self._alone(route)
            return
        if isinstance(route, Route):
            self._fill(route)
        sent = self._flight.popleft()
        answered = self._result(sent)
        if answered is not None:
            yield from self._take(answered, sent)

    def _way_on(self) -> Route | NoRoute:
        """To the server that works on this text; what is under way ends first where that is another one."""
        assert isinstance(self._remote, Remote)
        route = self._remote.route()
        if isinstance(route, Route) and route.node != self._flight[-1].node:
            return NoRoute(f"{self._flight[-1].node} is not to be asked any more")
        return route

    def _fill(self, route: Route) -> None:
        """Draft and send, until a verdict is there or nothing is left that is worth it."""
        plan = self._plan(route)
        while True:
            self._drafting.heed()
            if self._flight and self._flight[0].future.done():
                return
            step = plan.step(self._moment(plan))
            if step == "wait":
                return
            if step == "send":
                self._send(route)
            else:
                self._drafting.draft()

    def _send(self, route: Route) -> None:
        assert isinstance(self._remote, Remote)
        sent = self._remote.send(route, self._confirmed, self._flight[-1] if self._flight else None)
        self.summary.drafted += sent.end - sent.confirmed
        self._flight.append(sent)
        sent.future.add_done_callback(lambda future: self._heard(sent, future))

    def _heard(self, sent: Sent, future: Future[Answered[Verdict]]) -> None:
        """Not in the text's own thread: what the device computes now may have become needless."""
        if not (self._flight and self._flight[0] is sent) or future.cancelled() or future.exception() is not None:
            return
        ahead = self._drafting.drafts[self._stood(future.result().reply, sent) :]
        if ahead and not self._goes_on(future.result().reply, sent, ahead):
            self._drafting.interrupt()

    def _stood(self, verdict: Verdict, sent: Sent) -> int:
        """Drafts from `_confirmed` on that stood."""
        return verdict.accepted - (self._confirmed - sent.confirmed)

    def _goes_on(self, verdict: Verdict, sent: Sent, ahead: Sequence[Draft]) -> bool:
        """All drafts sent stood, and the server's own token is the one that the device has gone on with."""
        return sent.confirmed + verdict.accepted == sent.end and bool(ahead) and ahead[0].token == verdict.token

    def _confident(self) -> Iterator[Token]:
        """A token that the exit is sure of leaves at once; the servers see it with the next one that it is not."""
        certificate = self._certificate
        if certificate is not None and self._drafting.confidence() >= certificate.threshold:
            yield from self._emit_own(self._drafting.own())
            return
        route = self._route()
        if isinstance(route, NoRoute):
            yield from self._alone(route)
            return
        self._send(route)
        sent = self._flight.popleft()
        answered = self._result(sent)
        if answered is not None:
            yield from self._take(answered, sent)

    def _route(self) -> Route | NoRoute:
        if isinstance(self._remote, NoRoute):
            return self._remote
        route = self._remote.route(self._tried)
        if isinstance(route, NoRoute) and self.summary.servers and not self._waited:
            # A text that had a server is worth a moment: a link that broke is often back, or another one is found.
            self._waited = True
            self._tried = []
            self._remote.wait(PATIENCE_S)
            route = self._remote.route()
        return route

    def _alone(self, why: NoRoute) -> Iterator[Token]:
        """What the device says itself; servers are looked for again at the next token."""
        if not why.by_choice:
            self.summary.degraded, self.summary.reason = True, why.reason
        self._tried = []
        # Drafts were a shortlist's choice, for a server to decide.
        self._drafting.fell(self._confirmed)
        yield from self._emit_own(self._drafting.own())

    def _result(self, sent: Sent) -> Answered[Verdict] | None:
        """The verdict, or None: then the round is to be tried again, elsewhere."""
        assert isinstance(self._remote, Remote)
        try:
            answered = self._remote.result(sent)
        except LinkError as exc:
            # One that loses a session it has just been given whole would be asked for ever.
            if not superseded(exc) and (not forgot(exc) or sent.count == sent.end):
                self._tried.append(sent.node)
                self.summary.reason = str(exc)
            self._discard()
            return None
        self._tried, self._waited = [], False
        self._count(answered, sent)
        return answered

    # Drafting

    def _plan(self, route: Route) -> Plan:
        fixed_s, slope_s = self._pace.server.fit()
        return Plan(
            self._limits.draft_floor,
            self._limits.max_drafts,
            route.estimate.round_trip_s + route.estimate.queue_s,
            self._pace.step_s,
            fixed_s,
            slope_s + self._token_bytes * route.estimate.s_per_byte,
            others_s=OTHERS * fixed_s,
            queue_s=route.estimate.queue_s,
        )

    def _moment(self, plan: Plan) -> Moment:
        assert isinstance(self._remote, Remote)
        drafts = self._drafting.drafts
        sent_end = self._flight[-1].end if self._flight else self._remote.held
        chances = [self._acceptance.chance(draft.probability) for draft in drafts]
        old = max(0, sent_end - self._confirmed)
        ended = bool(drafts) and drafts[-1].token in self._stop
        possible = len(drafts) + 1 < self._left and not ended and len(drafts) < plan.furthest
        return Moment(
            in_flight=len(self._flight),
            unsent=self._drafting.length - sent_end,
            drafted=len(chances) - old,
            sent=prod(chances[:old]),
            fresh=chances[old:],
            chance=lambda: self._acceptance.chance(self._drafting.choose().probability) if possible else 0.0,
        )

    # Tokens leave

    def _take(self, answered: Answered[Verdict], sent: Sent) -> Iterator[Token]:
        """What a verdict made certain."""
        verdict = answered.reply
        before, count = self._confirmed - sent.confirmed, self._stood(verdict, sent)
        stood, ahead = self._drafting.drafts[:count], self._drafting.drafts[count:]
        for draft in stood:
            self._acceptance.saw(draft.probability, True)
        whole = sent.confirmed + verdict.accepted == sent.end
        known = self._goes_on(verdict, sent, ahead)
        if ahead:
            self._acceptance.saw(ahead[0].probability, known)
        # The server's own token was a draft where a verification that follows has it.
        was_sent = known and bool(self._flight)
        self.summary.accepted += len(stood) + was_sent
        self.summary.refused += not known and bool(ahead) and (not whole or bool(self._flight))
        said = [*(draft.token for draft in stood), verdict.token]
        self._confirmed += len(said)
        if known:
            self._drafting.drafts = ahead[1:]
        else:
            self._discard()
            self._drafting.fell(self._confirmed - 1)
        for at, token in enumerate(said):
            tier: Tier = "device" if at < len(stood) or was_sent else verdict.tier
            yield from self._emit(token, tier, verdict.probabilities[before + at], verified=True)
        if not known and not self.summary.finish:
            self._drafting.add(verdict.token)

    def _discard(self) -> None:
        """What follows builds on drafts that fell: the server refuses it, and nobody waits for that."""
        self.summary.bytes_up += sum(sent.payload_bytes + HEADER_BYTES for sent in self._flight)
        self._flight.clear()

    def _emit_own(self, draft: Draft) -> Iterator[Token]:
        """A token of the device that no server has seen."""
        self._confirmed += 1
        yield from self._emit(draft.token, "device", draft.probability, verified=False)
        if not self.summary.finish:
            self._drafting.add(draft.token)

    def _emit(self, token: int, tier: Tier, probability: float, *, verified: bool) -> Iterator[Token]:
        if self.summary.finish:
            return
        summary = self.summary
        summary.seconds = time.perf_counter() - self._began_s
        if token in self._stop:
            summary.finish = "stop"
            return
        if summary.count == 0:
            summary.first_token_s = summary.seconds
        summary.tokens[tier] += 1
        summary.unverified += not verified
        if self._left <= 0:
            summary.finish = "length"
        yield Token(token, self._stream.push(token), tier, probability, verified)

    def _count(self, answered: Answered[Verdict], sent: Sent) -> None:
        verdict, summary = answered.reply, self.summary
        if not summary.servers or summary.servers[-1] != sent.node:
            summary.servers.append(sent.node)
        summary.verifications += 1
        summary.passes += verdict.passes
        # Without the prompt's positions, which the first request brings.
        new = sent.end - max(sent.end - sent.count, len(self._prompt))
        summary.layer_tokens += verdict.layer_tokens * new // sent.count
        summary.redone += verdict.redone
        summary.bytes_up += answered.bytes_up
        summary.bytes_down += answered.bytes_down
        if verdict.degraded:
            summary.degraded, summary.reason = True, verdict.reason
        if verdict.hops and sent.count < USUAL_POSITIONS:
            self._pace.server.saw(sent.count, (verdict.hops[0].total_ms - verdict.hops[0].queue_ms) / 1e3)
