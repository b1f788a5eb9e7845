"""A request in flight, and what comes of it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from kinflow.frame import Buffer
from kinflow.messages import Echo, Probe, Reply, Request, Verdict, Verify
from kinflow.mqtt import Connection

R = TypeVar("R", Reply, Verdict)


class Answered(msgspec.Struct, Generic[R], frozen=True):
    """A reply, or a verdict, and what it cost."""

    reply: R
    bytes_up: int
    """Whole MQTT payloads sent, of all attempts."""
    bytes_down: int
    """The MQTT payload of the reply."""
    round_trip_s: float
    """From the first attempt to the reply."""
    attempts: int = 1
    """Above 1 the reply may belong to any of them, and `round_trip_s` is no measure of the way."""


@dataclass(frozen=True)
class Echoed:
    """A probe's answer."""

    echo: Echo
    bytes_up: int
    round_trip_s: float


class Awaited(Future[Any]):
    """A request in flight. Whoever waits for it reads the socket meanwhile: a reply switches no threads."""

    def __init__(
        self,
        connection: Connection,
        topic: str,
        request: Request | Verify | Probe,
        payload: Buffer,
        timeout_s: float,
        repeat_after_s: float,
    ) -> None:
        super().__init__()
        self._connection = connection
        self.topic = topic
        self.request = request
        self.payload = payload
        self.sent_s = time.monotonic()
        self.deadline_s = self.sent_s + timeout_s
        self.repeat_after_s = repeat_after_s
        self.due_s = self.deadline_s
        """When it is to be looked after again, unless the reply comes."""
        self.bytes_up = 0
        self.attempts = 0
        self.repeated = False  # it was published again for want of a reply, on the present connection
        self.orphaned = False  # its connection was lost, and with it perhaps the request or the reply

    def cancel(self) -> bool:
        return False

    def result(self, timeout: float | None = None) -> Any:
        return super().result(self._drive(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._drive(timeout))

    def _drive(self, timeout_s: float | None) -> float | None:
        """What is left of the timeout afterwards."""
        if self.done():
            return timeout_s
        give_up_s = None if timeout_s is None else time.monotonic() + timeout_s
        until_s = self.deadline_s if give_up_s is None else min(give_up_s, self.deadline_s)
        self._connection.drive(self.done, until_s)
        return None if give_up_s is None else max(0.0, give_up_s - time.monotonic())
