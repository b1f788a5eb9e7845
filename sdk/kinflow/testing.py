"""Fakes for the tests of an app: a device that answers what the test says, without bundle, runtime or network.

    from kinflow.testing import FakeDevice, answer

    def test_a_parcel_is_opened_only_when_the_scanner_is_sure():
        with FakeDevice([answer("parcel"), answer("parcel", degraded=True)]) as device:
            assert [opens(device, image) for image in images] == [True, False]

An app that takes an `InferenceDevice` instead of a `kinflow.Device` can be given either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Protocol

import msgspec

from kinflow.answer import Answer, Timings
from kinflow.errors import SettingsError
from kinflow.messages import MAX_DEADLINE_MS, Tier
from kinflow.policy import CONFIDENT

__all__ = ["FakeDevice", "InferenceDevice", "answer"]


class InferenceDevice(Protocol):
    """What an app uses of `kinflow.Device`; both it and `FakeDevice` are one."""

    def __enter__(self) -> InferenceDevice: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def wait_for_server(self, timeout_s: float) -> bool: ...

    def infer(self, image: Any, *, deadline_s: float | None = None) -> Answer: ...

    def submit(
        self, image: Any, *, deadline_s: float | None = None, when: Literal["now", "eventually"] = "now"
    ) -> Future[Answer]: ...

    def collect(self) -> Iterator[Answer]: ...


def answer(label: str = "label", tier: Tier = "device", **overrides: Any) -> Answer:
    """An Answer whose other fields fit `tier`; `overrides` are fields of Answer.

    `degraded=True` gets a reason, as every degraded answer has one. Raises TypeError for a field that Answer
    does not have.
    """
    degraded = bool(overrides.get("degraded", False))
    offloaded = tier != "device"
    plausible = Answer(
        label=label,
        index=0,
        confidence=0.5 if degraded else 0.9,
        tier=tier,
        exit=tier,
        degraded=degraded,
        reason="no server found yet" if degraded else "" if offloaded else CONFIDENT,
        bytes_up=256 if offloaded else 0,
        bytes_down=96 if offloaded else 0,
        total_ms=5.0 if offloaded else 1.0,
        timings=Timings(compute_ms=1.0, encode_ms=0.5, link_ms=3.5) if offloaded else Timings(compute_ms=1.0),
        request_id="00" * 16,
    )
    return msgspec.structs.replace(plausible, **overrides)


class FakeDevice:
    """Stands in for `kinflow.Device`: gives `answers` in turn; one that is an exception is raised.

    Any iterable will do: `itertools.repeat(answer("cat"))` never ends. Asking for more than there is fails the
    test with AssertionError. Images are not looked at, but kept in `images`, and the deadlines in
    `deadlines_s`. `server` is what `wait_for_server` says, at once. `collected` is what `collect` hands out, once.
    Safe to share by threads.
    """

    def __init__(
        self, answers: Iterable[Answer | Exception], *, server: bool = True, collected: Iterable[Answer] = ()
    ) -> None:
        self._answers = iter(answers)
        self._server = server
        self._collected = iter(collected)
        self._lock = threading.Lock()
        self._open = False
        self.images: list[Any] = []
        """The images asked about, in order."""
        self.deadlines_s: list[float | None] = []
        """Each image's `deadline_s`."""

    def __enter__(self) -> FakeDevice:
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False

    def wait_for_server(self, timeout_s: float) -> bool:  # noqa: ARG002 - as Device's
        """What the test said; does not wait."""
        return self._server

    def infer(self, image: Any, *, deadline_s: float | None = None) -> Answer:
        """The next answer. Raises it when it is an exception, and SettingsError on a deadline no Device takes."""
        if deadline_s is not None and not 0 < deadline_s <= MAX_DEADLINE_MS / 1e3:
            raise SettingsError(f"deadline_s must be above 0 and at most an hour, got {deadline_s!r}")
        with self._lock:
            self.images.append(image)
            self.deadlines_s.append(deadline_s)
            upcoming = next(self._answers, None)
            asked = len(self.images)
        if upcoming is None:
            raise AssertionError(f"FakeDevice was asked {asked} times, it has {asked - 1} answers")
        if isinstance(upcoming, Exception):
            raise upcoming
        return upcoming

    def collect(self) -> Iterator[Answer]:
        """What the test said an earlier process had submitted."""
        return self._collected

    def submit(
        self,
        image: Any,
        *,
        deadline_s: float | None = None,
        when: Literal["now", "eventually"] = "now",  # noqa: ARG002 - as Device's
    ) -> Future[Answer]:
        """`infer` as a Future that is done already. Raises SettingsError outside of a with block."""
        if not self._open:
            raise SettingsError("the device is not open: use it in a with block")
        future: Future[Answer] = Future()
        try:
            future.set_result(self.infer(image, deadline_s=deadline_s))
        except Exception as exc:
            future.set_exception(exc)
        return future
