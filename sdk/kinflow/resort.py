"""One request and the nodes that may answer it: the next is asked when one fails or is silent for too long.

The first reply is taken, the others are cancelled. Silence is noticed by whoever waits for the result; where
nobody does, `watch` leaves it to the network thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial

from kinflow.awaited import Answered
from kinflow.errors import LinkError, LinkLost, LinkTimeout
from kinflow.messages import Reply
from kinflow.peer import Attempt

# Several nodes were asked, or another thread reads the socket: how long to wait before looking around.
SLICE_S = 0.05


class Resort(Future[Answered[Reply]]):
    """`ask(nodes)` asks the best node that is none of `nodes` and can still make it; None when there is none.

    Ends as Link.request does, with the last node's error when none of them answered.
    """

    def __init__(self, deadline_s: float, ask: Callable[[Collection[str]], Attempt | None]) -> None:
        super().__init__()
        self._deadline_s = deadline_s
        self._ask = ask
        self._lock = threading.RLock()
        self._attempts: list[Attempt] = []
        self._exhausted = False
        self._over = False
        self._error: LinkError | None = None
        self.story = ""
        """What happened on the way, unless the first node simply answered."""

    def cancel(self) -> bool:
        return False

    def begin(self) -> Resort:
        """Ask the first node."""
        self._ask_next()
        return self

    def result(self, timeout: float | None = None) -> Answered[Reply]:
        return super().result(self._wait(timeout))

    def answer(self, remaining_s: float, labels: int) -> Answered[Reply]:
        """`result`, for a family with so many labels; LinkError is all that it raises."""
        try:
            answered = self.result(remaining_s)
        except (FutureTimeoutError, CancelledError) as exc:
            raise LinkTimeout(f"no reply within {remaining_s * 1e3:.0f} ms") from exc
        if answered.reply.label >= labels:
            raise LinkError(f"a server answered with label {answered.reply.label}, the family has fewer")
        return answered

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._wait(timeout))

    def watch(self) -> None:
        """Nobody waits: notice silence on the network thread."""
        attempt = self._latest
        if attempt is not None:
            attempt.peer.link.connection.call_at(attempt.late_s, partial(self._on_silence, attempt))

    def abandon(self) -> None:
        """The answer is not wanted any more: cancel it wherever it was asked for."""
        with self._lock:
            self._exhausted = True
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.peer.link.cancel(attempt.request_id)

    @property
    def _latest(self) -> Attempt | None:
        attempts = self._attempts  # another thread may end it meanwhile
        return attempts[-1] if attempts and not self._exhausted else None

    def _wait(self, timeout_s: float | None) -> float | None:
        """Read the socket while one node alone was asked; ask the next when it is late. What is left of the timeout."""
        if self.done():
            return timeout_s
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        until_s = self._deadline_s if give_up_s is None else min(give_up_s, self._deadline_s)
        while (attempts := self._attempts) and not self.done() and (now_s := time.monotonic()) < until_s:
            attempt = attempts[-1]
            next_s = until_s if self._exhausted else max(now_s, min(attempt.late_s, until_s))
            if len(attempts) == 1:
                attempt.peer.link.connection.drive(attempt.future.done, next_s)
                if self.done():
                    break
            with contextlib.suppress(FutureTimeoutError):
                super().exception(max(0.0, min(next_s - time.monotonic(), SLICE_S)))
            if attempt is self._latest and (time.monotonic() >= attempt.late_s or not attempt.peer.link.connected):
                self._on_silence(attempt)
        return None if give_up_s is None else max(0.0, give_up_s - time.monotonic())

    def _on_silence(self, attempt: Attempt) -> None:
        if not attempt.future.done() and attempt is self._latest and self._ask_next():
            self.watch()

    def _ask_next(self) -> bool:
        """Ask one more node; whether there was one. Its callback may come at once, and ask again."""
        with self._lock:
            if self._over or self._exhausted:
                return False
            before = self._attempts[-1] if self._attempts else None
            attempt = self._ask([attempt.peer.node for attempt in self._attempts])
            if attempt is None:
                self._exhausted = True
            else:
                self._attempts.append(attempt)
                if before is not None and not before.future.done():
                    self._tell(f"{before.peer.node} was silent, {attempt.peer.node} was asked too")
        if attempt is None:
            if all(each.future.done() for each in self._attempts):
                self._end(None)
            return False
        attempt.future.add_done_callback(partial(self._on_end, attempt.peer.node))
        return True

    def _on_end(self, node: str, future: Future[Answered[Reply]]) -> None:
        try:
            answered = future.result()
        except LinkError as exc:
            error = exc
        else:
            self._end(answered)
            return
        with self._lock:
            if self._over:
                return
            self._error = error
            self._tell(f"{node}: {error.code}")
            under_way = any(not each.future.done() for each in self._attempts)
        if not under_way and not self._ask_next():
            self._end(None)

    def _end(self, answered: Answered[Reply] | None) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            others = [attempt for attempt in self._attempts if not attempt.future.done()]
            # Their futures call this: a circle, and what they hold would wait for the garbage collector.
            self._attempts = []
        if answered is None:
            self.set_exception(self._error or LinkLost("the node that was chosen is gone, and there is no other"))
        else:
            self.set_result(answered)
        for attempt in others:
            attempt.peer.link.cancel(attempt.request_id)

    def _tell(self, what: str) -> None:
        self.story = f"{self.story}; {what}" if self.story else what
