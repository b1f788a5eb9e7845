"""The network thread's clock."""

from __future__ import annotations

import threading
import time

import pytest

from kinflow.timers import Timers


@pytest.fixture
def timers() -> Timers:
    timers = Timers()
    timers.open()
    yield timers
    timers.close()


def test_calls_come_in_their_order_and_not_early(timers: Timers) -> None:
    """Calls added in any order are made in the order of their times, none before its time."""
    start_s = time.monotonic()
    made: list[tuple[int, float]] = []
    for order in (2, 0, 1):
        timers.add(start_s + 0.02 * order, lambda order=order: made.append((order, time.monotonic())))
    while len(made) < 3:
        timers.sleep(start_s + 5)
    assert [order for order, _ in made] == [0, 1, 2]
    assert all(when_s >= start_s + 0.02 * order for order, when_s in made)
    assert made[-1][1] < start_s + 1


def test_an_earlier_call_ends_a_longer_sleep(timers: Timers) -> None:
    """A call added by another thread while the sleeper sleeps is made in time, not when the sleep ends."""
    made = threading.Event()
    threading.Timer(0.05, lambda: timers.add(time.monotonic() + 0.01, made.set)).start()
    start_s = time.monotonic()
    while not made.is_set():
        timers.sleep(start_s + 10)
    assert time.monotonic() - start_s < 5


def test_a_wake_before_the_sleep_is_not_lost(timers: Timers) -> None:
    """A wake that comes while nobody sleeps ends the next sleep at once."""
    timers.wake()
    start_s = time.monotonic()
    timers.sleep(start_s + 10)
    assert time.monotonic() - start_s < 5


def test_a_call_that_fails_does_not_stop_the_others(timers: Timers) -> None:
    """An exception in one call is logged; the calls after it are made."""
    made: list[int] = []
    timers.add(0.0, lambda: 1 // 0)
    timers.add(0.0, lambda: made.append(1))
    timers.sleep(time.monotonic())
    assert made == [1]


def test_nothing_happens_after_close() -> None:
    """Adding and waking after close is harmless, whichever thread is late."""
    timers = Timers()
    timers.open()
    timers.close()
    timers.add(0.0, lambda: None)
    timers.wake()
