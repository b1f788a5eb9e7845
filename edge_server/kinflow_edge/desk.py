"""What a worker does with every request, whatever it computes: who sent it, was it here before, what became of it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from kinflow import frame, topics
from kinflow.errors import FrameError, KinflowError, LinkError, Superseded
from kinflow.logs import event
from kinflow.messages import Busy, Cancel, Echo, Failure, Message, Probe, Release, Reply, Request, Verdict, Verify
from kinflow_edge.allowance import Allowance
from kinflow_edge.recent import RecentRequests

log = logging.getLogger("kinflow.worker")

# The answer still has to travel back: a server asks upstream for that much less than what is left.
REPLY_RESERVE_S = 0.005

Asked = Request | Verify


class Desk:
    """Reads frames and sends answers through `publish`; counts both. For any thread."""

    def __init__(self, node: str, publish: Callable[[str, bytes], None], per_s: float, test_client: str = "") -> None:
        """`per_s`: messages of one client that are read in a second.

        `test_client`: whose requests are the server's own test, and not counted.
        """
        self.node = node
        self.counts: Counter[str] = Counter()
        """Since the start: served, escalated, busy, limited, repeated, cancelled, expired, lost, superseded, and
        failed:<code>."""
        self.last_request_s: float | None = None
        """When a request came last (time.monotonic()), the server's own tests aside."""
        self._publish = publish
        self._test_client = test_client
        self._allowance = Allowance(per_s)
        self._recent = RecentRequests()

    @property
    def rejected(self) -> int:
        return (
            self.counts["busy"]
            + self.counts["limited"]
            + sum(n for name, n in self.counts.items() if name.startswith("failed:"))
        )

    def is_test(self, asked: Asked) -> bool:
        return asked.client == self._test_client

    def read(self, topic: str, data: frame.Buffer, kinds: tuple[type[Message], ...]) -> frame.Frame | None:
        """A frame with a message of `kinds` from whom the topic names; else it is counted, and there is nothing.

        Nor is there when that client sends too much.
        """
        try:
            found = frame.unpack(data)
            message = found.message
            if not isinstance(message, kinds) or not isinstance(message, (Request, Verify, Release, Cancel, Probe)):
                raise FrameError(f"a {type(message).__name__} came on {topic}, requests are expected there")
            # The broker's access list sees to the topic alone: a reply goes only to whom the topic names.
            if topics.client_of(topic) != message.client:
                raise FrameError(f"a request of {message.client} came on {topic}: not its own topic")
        except FrameError as exc:
            # Nobody to answer: the id and the reply topic are in what could not be read.
            self.counts[f"failed:{exc.code}"] += 1
            event(log, logging.WARNING, "refused", code=exc.code, topic=topic, error=str(exc))
            return None
        wait_s = (
            0.0 if message.client == self._test_client else self._allowance.take(message.client, 1, time.monotonic())
        )
        if wait_s > 0:
            self._limit(message, wait_s)
            return None
        return found

    def _limit(self, message: Request | Verify | Release | Cancel | Probe, wait_s: float) -> None:
        self.counts["limited"] += 1
        if isinstance(message, (Request, Verify)):
            self._send(message, frame.pack(Busy(message.id, self.node, wait_s * 1e3)))

    def is_new(self, asked: Asked, arrived_s: float) -> bool:
        """A repeat is answered from memory, as soon as there is an answer."""
        if not self.is_test(asked):
            self.last_request_s = arrived_s
        new, reply = self._recent.begin(asked.client, asked.id)
        if not new:
            self.counts["repeated"] += 1
            if reply is not None:
                self._send(asked, reply)
        return new

    def guarded(self, asked: Asked, handle: Callable[[], None], undo: Callable[[], None] | None = None) -> None:
        """Run what may fail for this one request, and `undo` then: the server outlives whatever it brings."""
        try:
            handle()
        except Exception as exc:
            if undo is not None:
                undo()
            self.fail_with(asked, exc)

    def fail_with(self, asked: Asked, exc: Exception) -> None:
        """Called where `exc` is handled."""
        if isinstance(exc, KinflowError):
            self.fail(asked, exc)
        else:
            log.exception("internal error id=%s", asked.id.hex())
            self.fail(asked, KinflowError(f"{type(exc).__name__}: {exc}"))

    def echo(self, probe: Probe, queue_s: float) -> None:
        self._send(probe, frame.pack(Echo(probe.id, self.node, queue_s * 1e3)))

    def answer(self, asked: Asked, reply: Reply | Verdict, arrived_s: float) -> None:
        self._send(asked, self.finish(asked, reply, arrived_s))

    def finish(self, asked: Asked, reply: Reply | Verdict, arrived_s: float) -> bytes:
        """Count and remember an answer; what is to be sent."""
        if not self.is_test(asked):
            self.counts["served"] += 1
        data = frame.pack(reply)
        self._recent.finish(asked.client, reply.id, data)
        if log.isEnabledFor(logging.INFO):
            spent_ms = round((time.monotonic() - arrived_s) * 1e3, 2)
            event(log, logging.INFO, "answered", id=reply.id.hex(), exit=reply.exit, tier=reply.tier, ms=spent_ms)
        return data

    def refuse_busy(self, asked: Asked, queue_s: float) -> None:
        self.counts["busy"] += 1
        self._recent.forget(asked.client, asked.id)
        event(log, logging.INFO, "busy", id=asked.id.hex(), queue_ms=round(queue_s * 1e3, 1))
        self._send(asked, frame.pack(Busy(asked.id, self.node, queue_s * 1e3)))

    def fail(self, asked: Asked, error: KinflowError) -> None:
        usual = isinstance(error, Superseded)  # a client that drafts ahead expects it now and then
        self.counts["superseded" if usual else f"failed:{error.code}"] += 1
        level = logging.DEBUG if usual else logging.WARNING
        event(log, level, "refused", id=asked.id.hex(), code=error.code, error=str(error))
        data = frame.pack(Failure(asked.id, self.node, error.code, str(error)[:512]))
        self._recent.finish(asked.client, asked.id, data)
        self._send(asked, data)

    def expired(self, asked: Asked) -> None:
        """Its deadline has passed: nobody waits for an answer."""
        self.counts["expired"] += 1
        event(log, logging.INFO, "expired", id=asked.id.hex())

    def cancelled(self, client: str, request_id: bytes) -> None:
        """It is not answered; it may be asked again."""
        self.counts["cancelled"] += 1
        self._recent.forget(client, request_id)

    def _send(self, asked: Asked | Probe, data: bytes) -> None:
        """A reply that cannot be sent is lost: the device's deadline takes care of it."""
        try:
            self._publish(topics.reply(asked.client), data)
        except LinkError as exc:
            self.lost(1, exc)

    def lost(self, answers: int, error: LinkError) -> None:
        self.counts["lost"] += answers
        event(log, logging.WARNING, "lost", answers=answers, error=str(error))
