"""The breaker's three states, and how long a node that fails is left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kinflow.breaker import FIRST_WAIT_S, MAX_WAIT_S, TRIP_AFTER, Breaker


def failing(times: int, now_s: float = 0.0, chance: float = 1.0) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        breaker = breaker.failed(now_s, chance)
    return breaker


def test_a_few_failures_are_forgiven_and_a_success_forgets_them() -> None:
    """Only failures in a row open it."""
    assert failing(TRIP_AFTER - 1).state(0.0) == "closed"
    assert failing(TRIP_AFTER - 1).succeeded().failed(0.0, 1.0).state(0.0) == "closed"
    assert failing(TRIP_AFTER).state(0.0) == "open"


def test_open_half_open_closed() -> None:
    """After its wait it may be tried; a success closes it, a failure opens it for twice as long."""
    opened = failing(TRIP_AFTER)
    assert opened.state(FIRST_WAIT_S - 0.01) == "open"
    assert opened.state(FIRST_WAIT_S) == "half-open"
    assert opened.succeeded().state(FIRST_WAIT_S) == "closed"
    again = opened.failed(10.0, 1.0)
    assert again.state(10.0 + 2 * FIRST_WAIT_S - 0.01) == "open"
    assert again.state(10.0 + 2 * FIRST_WAIT_S) == "half-open"


def test_a_node_that_says_it_is_back_is_tried_at_once() -> None:
    """Its status came again: no need to wait, but still a probe first."""
    assert failing(20).back(1.0).state(1.0) == "half-open"
    assert Breaker().back(1.0).state(0.0) == "closed"


@given(st.integers(TRIP_AFTER, 10_000), st.floats(0, 1))
def test_no_wait_is_longer_than_the_longest_nor_without_jitter(failures: int, chance: float) -> None:
    """However long it was away, it is tried every few seconds; devices are spread over half of the wait."""
    wait_s = Breaker(failures - 1).failed(0.0, chance).retry_at_s
    assert 0 < wait_s <= MAX_WAIT_S
    least_s, most_s = (Breaker(failures - 1).failed(0.0, extreme).retry_at_s for extreme in (0.0, 1.0))
    assert least_s <= wait_s <= most_s
    assert least_s == most_s / 2
