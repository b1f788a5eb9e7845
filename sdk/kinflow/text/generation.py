"""One generated text: drafts on the device, verdicts from above, tokens out as they are certain."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from kinflow.awaited import Answered
from kinflow.confidence import read
from kinflow.errors import InputError, LinkError
from kinflow.messages import Tier, Verdict
from kinflow.policy import NoRoute, Route
from kinflow.text.codec import FeatureCodec
from kinflow.text.draft import Acceptance, Pace, Plan
from kinflow.text.drafter import Drafter
from kinflow.text.manifest import Exit
from kinflow.text.remote import ID_BYTES, Positions, Remote, Sent, forgot
from kinflow.text.sampling import Sampling, choose
from kinflow.text.tokenizer import Stream, Tokenizer

Mode = Literal["exact", "family", "confident", "local"]
Finish = Literal["", "stop", "length"]

# Drafted while a verdict is under way, where it is likely enough to be of use.
AHEAD_CHANCE = 0.3
# Positions of a verification from which nothing is learned about the usual pace: a prompt's.
USUAL_POSITIONS = 64
# How long a text waits when its last server is gone, before the device goes on alone.
PATIENCE_S = 2.0


class Token(msgspec.Struct, frozen=True):
    """One token of the text."""

    id: int
    text: str
    """What it adds to the text; empty while a character is not whole."""
    tier: Tier
    """Who said it first: the device whose draft stood, or the server that knew better."""
    probability: float
    """By the exit that decided."""
    verified: bool
    """False: the device's own exit alone decided."""


class Summary(msgspec.Struct):
    """What a text cost; it grows while the text does."""

    mode: Mode
    prompt_tokens: int = 0
    tokens: dict[Tier, int] = msgspec.field(default_factory=lambda: {"device": 0, "edge": 0, "cloud": 0})
    """By tier."""
    unverified: int = 0
    """Of the device's tokens, those that no server saw before they were shown."""
    drafted: int = 0
    """Drafts that were sent."""
    accepted: int = 0
    """Of them, those that stood."""
    verifications: int = 0
    passes: int = 0
    """Forward passes of the servers."""
    layer_tokens: int = 0
    """Layers times positions that the servers computed, the prompt's apart."""
    redone: int = 0
    """Positions that a server decided from token ids (`exact`)."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    first_token_s: float = 0.0
    servers: list[str] = []
    """Nodes that held the session, in their order."""
    finish: Finish = ""
    degraded: bool = False
    """Some token is not what the mode promises; `reason` says why."""
    reason: str = ""

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(self.tokens.values())


class Limits(NamedTuple):
    """How long a text may get, and how far it is drafted."""

    max_tokens: int
    context: int
    draft_floor: float
    max_drafts: int


class _Draft(NamedTuple):
    token: int
    probability: float


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
        self._sampling = sampling
        self._limits = limits
        self._drafter = drafter
        self._exit = exit_spec
        self._codec = codec
        self._positions = positions
        self._remote = remote
        self._acceptance = acceptance
        self._pace = pace
        self._stop = tokenizer.stop_tokens
        self._stream = Stream(tokenizer)
        self._drafts: list[_Draft] = []
        self._confirmed = 0
        """Positions whose token is certain; the device may not have computed the last one yet."""
        self._next: _Draft | None = None
        """What `_choose` found for the position after the last one computed."""
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
            self._add(self._prompt, begin=True)
            self._confirmed = len(self._prompt)
            while not self.summary.finish:
                yield from self._confident() if self.summary.mode == "confident" else self._round()
        finally:
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
        route = self._route()
        if isinstance(route, NoRoute):
            yield from self._alone(route)
            return
        assert isinstance(self._remote, Remote)
        plan = self._plan(route)
        while self._worth(plan):
            self._draft()
        sent = self._remote.send(route, self._confirmed)
        self._draft_ahead(sent)
        answered = self._result(sent)
        if answered is not None:
            yield from self._take(answered, sent)

    def _confident(self) -> Iterator[Token]:
        """A token that the exit is sure of leaves at once; the servers see it with the next one that it is not."""
        certificate = self._exit.certificate
        confidence = read(self._drafter.logits, self._exit.temperature).confidence
        if certificate is not None and confidence >= certificate.threshold:
            yield from self._emit_own(self._choose())
            return
        route = self._route()
        if isinstance(route, NoRoute):
            yield from self._alone(route)
            return
        assert isinstance(self._remote, Remote)
        sent = self._remote.send(route, self._confirmed)
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
        drafts, self._drafts = self._drafts, []
        for draft in drafts or [self._choose()]:
            yield from self._emit_own(draft)

    def _result(self, sent: Sent) -> Answered[Verdict] | None:
        """The verdict, or None: then the round is to be tried again, elsewhere."""
        assert isinstance(self._remote, Remote)
        try:
            answered = self._remote.result(sent)
        except LinkError as exc:
            # One that loses a session it has just been given whole would be asked for ever.
            if not forgot(exc) or sent.count == sent.end:
                self._tried.append(sent.node)
                self.summary.reason = str(exc)
            return None
        self._tried, self._waited = [], False
        self._count(answered, sent)
        return answered

    # Drafting

    def _plan(self, route: Route) -> Plan:
        fixed_s, slope_s = self._pace.server.fit()
        size = ID_BYTES + (self._codec.token_bytes if self._codec else 0)
        return Plan(
            self._limits.draft_floor,
            self._limits.max_drafts,
            route.estimate.round_trip_s + route.estimate.queue_s,
            self._pace.step_s,
            fixed_s,
            slope_s + size * route.estimate.s_per_byte,
            others_s=fixed_s,
        )

    def _worth(self, plan: Plan) -> bool:
        drafts = self._drafts
        if len(drafts) + 1 >= self._left or (drafts and drafts[-1].token in self._stop):
            return False
        tokens, standing = 1.0, 1.0
        for draft in drafts:
            standing *= self._acceptance.chance(draft.probability)
            tokens += standing
        return plan.more(len(drafts), tokens, standing, self._acceptance.chance(self._choose().probability))

    def _draft_ahead(self, sent: Sent) -> None:
        """Go on while the verdict is under way: it is of use when all drafts stand and the next one is right too."""
        chance = 1.0
        for draft in self._drafts:
            chance *= self._acceptance.chance(draft.probability)
        while not sent.future.done() and len(self._drafts) + 1 < min(self._left, 2 * self._limits.max_drafts):
            if self._drafts and self._drafts[-1].token in self._stop:
                return
            chance *= self._acceptance.chance(self._choose().probability)
            if chance < AHEAD_CHANCE:
                return
            self._draft()

    def _draft(self) -> None:
        draft = self._choose()
        self._drafts.append(draft)
        self._add([draft.token])

    def _choose(self) -> _Draft:
        """What the device's exit would say next, and how sure it is of that."""
        if self._next is None:
            logits = self._drafter.logits
            token, probability, _ = choose(logits, self._sampling, self._drafter.length)
            if self._sampling.temperature == 0:
                probability = read(logits, self._exit.temperature).confidence
            self._next = _Draft(token, probability)
        return self._next

    def _add(self, tokens: Sequence[int], *, begin: bool = False) -> None:
        """The device computes these positions."""
        start_s = time.perf_counter()
        features = self._drafter.begin(tokens) if begin else self._drafter.feed(tokens[0])
        self._next = None
        if not begin:
            self._pace.stepped(time.perf_counter() - start_s)
        self._positions.add(tokens, self._codec.encode(features) if self._codec else b"")

    # Tokens leave

    def _take(self, answered: Answered[Verdict], sent: Sent) -> Iterator[Token]:
        """What a verdict made certain."""
        verdict = answered.reply
        sent_drafts = sent.end - sent.confirmed
        stood, ahead = self._drafts[: verdict.accepted], self._drafts[verdict.accepted :]
        for draft in stood:
            self._acceptance.saw(draft.probability, True)
        if verdict.accepted < sent_drafts:
            self._acceptance.saw(ahead[0].probability, False)
        elif ahead:
            self._acceptance.saw(ahead[0].probability, ahead[0].token == verdict.token)
        known = verdict.accepted == sent_drafts and bool(ahead) and ahead[0].token == verdict.token
        said = [*(draft.token for draft in stood), verdict.token]
        self._confirmed = sent.confirmed + len(said)
        if known:
            self._drafts = ahead[1:]
        else:
            self._drafts = []
            self._drafter.crop(sent.confirmed + verdict.accepted)
            self._positions.crop(sent.confirmed + verdict.accepted)
        for at, token in enumerate(said):
            tier: Tier = "device" if at < len(stood) else verdict.tier
            yield from self._emit(token, tier, verdict.probabilities[at], verified=True)
        if not known and not self.summary.finish:
            self._add([verdict.token])

    def _emit_own(self, draft: _Draft) -> Iterator[Token]:
        """A token of the device that no server has seen."""
        fed = self._drafter.length > self._confirmed
        self._confirmed += 1
        yield from self._emit(draft.token, "device", draft.probability, verified=False)
        if not fed and not self.summary.finish:
            self._add([draft.token])

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
        summary.drafted += sent.end - sent.confirmed
        summary.accepted += verdict.accepted
        summary.bytes_up += answered.bytes_up
        summary.bytes_down += answered.bytes_down
        if verdict.degraded:
            summary.degraded, summary.reason = True, verdict.reason
        if verdict.hops and sent.count < USUAL_POSITIONS:
            self._pace.server.saw(sent.count, (verdict.hops[0].total_ms - verdict.hops[0].queue_ms) / 1e3)
