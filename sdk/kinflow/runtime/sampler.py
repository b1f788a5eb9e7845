"""At most so many frames a second, and always the newest: what comes while the device computes replaces what waits."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from kinflow.errors import KinflowError
from kinflow.images import Item
from kinflow.runtime.sources import Source


class Sampler:
    """Use it with `with`. A live source is read on a thread of its own into one place, never into a queue."""

    def __init__(self, source: Source, rate_hz: float) -> None:
        """`rate_hz` 0: every frame that the device can keep up with."""
        self._source = source
        self._interval_s = 1 / rate_hz if rate_hz else 0.0
        self._due_s = 0.0
        self._changed = threading.Condition()
        self._newest: Item | None = None
        self._error: KinflowError | None = None
        self._ended = False
        self._thread: threading.Thread | None = None
        self.stale = 0
        """Frames that came and were replaced by a newer one before the device looked at them."""

    def __enter__(self) -> Sampler:
        self._source.__enter__()
        if self._source.live:
            self._thread = threading.Thread(target=self._read, name="kinflow-frames", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The thread ends with its source, or with the process: a read from a terminal cannot be interrupted.
        self._source.__exit__(kind, error, trace)

    @property
    def must_come(self) -> bool:
        """A source without frames is broken: a camera's, not a folder's."""
        return self._source.live

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._ended and self._newest is None

    def take(self, timeout_s: float) -> Item | None:
        """The newest frame once one is due; None when there is none within the time, or ever again.

        Raises what the source raised: SourceError, InputError.
        """
        give_up_s = time.monotonic() + timeout_s
        if (wait_s := self._due_s - time.monotonic()) > 0:
            time.sleep(min(wait_s, timeout_s))
            if self._due_s > give_up_s:
                return None
        item = self._wait(give_up_s) if self._source.live else self._pull()
        if item is not None:
            now_s = time.monotonic()
            # Ticks that were missed are not made up for.
            on_time = now_s - self._due_s < self._interval_s
            self._due_s = (self._due_s if on_time else now_s) + self._interval_s
        return item

    def _pull(self) -> Item | None:
        item = self._source.read()
        self._ended = item is None and self._source.ended
        if item is None and not self._ended:
            time.sleep(0.05)
        return item

    def _wait(self, give_up_s: float) -> Item | None:
        with self._changed:
            while self._newest is None and not self._ended and (left_s := give_up_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            item, self._newest = self._newest, None
            if item is None and self._error is not None:
                raise self._error
            return item

    def _read(self) -> None:
        error: KinflowError | None = None
        try:
            while (item := self._source.read()) is not None:
                with self._changed:
                    self.stale += self._newest is not None
                    self._newest = item
                    self._changed.notify()
        except KinflowError as exc:
            error = exc
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()
