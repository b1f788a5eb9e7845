"""What a client learns of the way to a node, from made-up ways that are known exactly."""

from __future__ import annotations

import random

import pytest

from kinflow.estimate import FIRST_ROUND_TRIP_S, FIRST_SPREAD_S, Estimator, LinkEstimate


def test_before_anything_is_heard_little_is_expected_but_patience_is_large() -> None:
    """A new node is tried, and not given up at once."""
    now = Estimator().now
    assert now.expected_s(10_000) == FIRST_ROUND_TRIP_S
    assert now.late_s(10_000) == FIRST_ROUND_TRIP_S + FIRST_SPREAD_S


def test_round_trip_and_throughput_are_told_apart() -> None:
    """40 ms and 64 kbit/s: small and large probes find both within a tenth."""
    estimator = Estimator()
    for _ in range(20):
        for size in (100, 2200):
            estimator.echoed(size, 0.040 + size / 8000, 0.0)
    assert estimator.now.round_trip_s == pytest.approx(0.040, rel=0.1)
    assert 1 / estimator.now.s_per_byte == pytest.approx(8000, rel=0.1)
    assert estimator.now.expected_s(1000) == pytest.approx(0.040 + 1000 / 8000, rel=0.1)


def test_a_slow_link_shows_in_what_large_requests_take() -> None:
    """The link slows down under requests of one size: a smaller codec is expected to be faster."""
    estimator = Estimator()
    estimator.echoed(100, 0.002, 0.0)
    for _ in range(12):
        estimator.replied(64_000, 5.0, 0.01, 0.0)
    assert estimator.now.expected_s(64_000) == pytest.approx(5.0, rel=0.1)
    assert estimator.now.expected_s(16_000) == pytest.approx(1.25, rel=0.15)


def test_queue_and_service_are_the_servers_and_not_the_ways() -> None:
    """What the server says it spent is taken off the way, and its queue is replaced by each report."""
    estimator = Estimator()
    for _ in range(10):
        estimator.replied(200, took_s=0.110, server_s=0.100, queue_s=0.070)
    assert estimator.now.round_trip_s == pytest.approx(0.010, rel=0.05)
    assert estimator.now.service_s == pytest.approx(0.030)
    assert estimator.now.expected_s(200) == pytest.approx(0.110, rel=0.05)
    estimator.reported(0.5)
    assert estimator.now.expected_s(200) == pytest.approx(0.540, rel=0.05)


def test_nineteen_of_twenty_come_before_they_are_late() -> None:
    """Under jitter the spread covers 95 percent, give or take what a window of 32 can know."""
    random_ = random.Random(3)
    estimator = Estimator()
    late = 0
    for number in range(2200):
        took_s = 0.02 + random_.expovariate(1 / 0.05)
        late += number >= 200 and took_s > estimator.now.late_s(200)
        estimator.replied(200, took_s, 0.0, 0.0)
    assert 0.02 < late / 2000 < 0.12


def test_silence_raises_loss_and_the_expected_time_and_replies_lower_both() -> None:
    """What waited longer than expected is a sample of at least that; loss makes a node dearer than its twin."""
    estimator = Estimator()
    estimator.replied(200, 0.01, 0.0, 0.0)
    for _ in range(5):
        estimator.unanswered(200, 0.3)
    silent = estimator.now
    assert silent.loss > 0.7
    assert silent.expected_s(200) > 0.2
    assert silent.cost_s(200) > 3 * silent.expected_s(200)
    for _ in range(20):
        estimator.replied(200, 0.01, 0.0, 0.0)
    assert estimator.now.loss < 0.01
    assert estimator.now.expected_s(200) < 0.02
    assert LinkEstimate(loss=1.0).cost_s(100) < 1.0  # never infinite


def test_an_early_giving_up_says_nothing_about_the_way() -> None:
    """Waiting less than is expected anyway is no sample of the time."""
    estimator = Estimator()
    estimator.replied(200, 0.2, 0.0, 0.0)
    before = estimator.now.expected_s(200)
    estimator.unanswered(200, 0.1)
    assert estimator.now.expected_s(200) == before
