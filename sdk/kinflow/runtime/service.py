"""The loop of `kinflow device`: newest frame -> answer -> sinks, with systemd told that all is well."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kinflow.board import BoardWatch
from kinflow.errors import LinkError, SourceError
from kinflow.logs import event
from kinflow.runtime.notify import Notifier
from kinflow.runtime.report import Report
from kinflow.runtime.sampler import Sampler
from kinflow.runtime.sinks import Sink
from kinflow.stopping import Stop
from kinflow.testing import InferenceDevice

log = logging.getLogger("kinflow.runtime")

# How long one look for a frame lasts: at most so late are SIGTERM and the watchdog heeded.
_LOOK_S = 0.5


@dataclass
class Counts:
    answers: int = 0
    degraded: int = 0
    tiers: dict[str, int] = field(default_factory=dict)


class Service:
    """Owns nothing: all parts are opened and closed by whoever calls `run`."""

    def __init__(
        self,
        name: str,
        device: InferenceDevice,
        sampler: Sampler,
        sinks: Sequence[Sink],
        *,
        board: BoardWatch | None = None,
        notifier: Notifier | None = None,
        stall_s: float = 30.0,
    ) -> None:
        self._name = name
        self._device = device
        self._sampler = sampler
        self._sinks = sinks
        self._board = board
        self._notifier = notifier or Notifier({})
        self._stall_s = stall_s
        self._failing: set[Sink] = set()
        self.counts = Counts()

    def run(self, stop: Stop, limit: int | None = None) -> Counts:
        """Until `stop`, the source's end, or `limit` answers.

        Raises SourceError when no frame came for `stall_s`, and what the source or the device's own graph raises:
        whoever watches over the service starts it again.
        """
        self._notifier.send("READY=1", "STATUS=waiting for the first frame")
        event(log, logging.INFO, "ready", device=self._name)
        last_s = time.monotonic()
        while not stop.is_set() and not self._sampler.ended and (limit is None or self.counts.answers < limit):
            item = self._sampler.take(_LOOK_S)
            if item is not None:
                self._answer(item.name, item.image)
                last_s = time.monotonic()
            elif self._sampler.must_come and time.monotonic() - last_s > self._stall_s:
                raise SourceError(f"no frame for {self._stall_s:.0f} s")
            self._notifier.send("WATCHDOG=1", f"STATUS={self._status()}")
        return self.counts

    def _answer(self, frame: str, image: object) -> None:
        answer = self._device.infer(image)
        self.counts.answers += 1
        self.counts.degraded += answer.degraded
        self.counts.tiers[answer.tier] = self.counts.tiers.get(answer.tier, 0) + 1
        state = None if self._board is None else self._board.state
        report = Report(self._name, frame, time.time(), answer, state, self._sampler.stale)
        for sink in self._sinks:
            self._write(sink, report)

    def _write(self, sink: Sink, report: Report) -> None:
        """Say once that a sink fails, and once that it works again: a full disk must not fill the journal too."""
        try:
            sink.write(report)
        except (OSError, LinkError) as exc:
            if isinstance(exc, BrokenPipeError):
                raise
            if sink not in self._failing:
                self._failing.add(sink)
                event(log, logging.WARNING, "sink fails", sink=type(sink).__name__, error=exc)
        else:
            if sink in self._failing:
                self._failing.discard(sink)
                event(log, logging.WARNING, "sink works again", sink=type(sink).__name__)

    def _status(self) -> str:
        tiers = ", ".join(f"{tier} {count}" for tier, count in sorted(self.counts.tiers.items()))
        return f"{self.counts.answers} answers ({tiers or 'none'}), {self._sampler.stale} frames stale"
