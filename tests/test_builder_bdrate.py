"""BD-rate against curves whose saving is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install 'kinflow[certify]'")

from kinflow_builder.bdrate import Point, bd_rate, front


def curve(scale: float, top1: list[float]) -> list[Point]:
    """Bytes grow tenfold with each tenth of accuracy."""
    return [Point(scale * 10 ** (10 * share), share) for share in top1]


def test_a_constant_saving_is_found() -> None:
    """A curve with a third of the bytes everywhere has -66.7%, the other way round +200%, itself 0."""
    theirs = curve(3.0, [0.5, 0.6, 0.7, 0.8])
    ours = curve(1.0, [0.55, 0.65, 0.75, 0.85])
    found = bd_rate(ours, theirs)
    assert found.percent == pytest.approx(-200 / 3)
    assert (found.low, found.high) == (0.55, 0.8)
    assert bd_rate(theirs, ours).percent == pytest.approx(200)
    assert bd_rate(theirs, theirs).percent == pytest.approx(0)


def test_it_is_the_mean_of_the_log_ratio() -> None:
    """Against the integral by small steps of two curves that differ in slope; straight ones, which PCHIP keeps."""
    ours, theirs = [Point(10, 0.6), Point(100, 0.9)], [Point(20, 0.5), Point(2000, 0.8)]
    shares = np.linspace(0.6, 0.8, 20_001)
    mine = np.log(10) * (1 + (shares - 0.6) / 0.3)
    other = np.log(20) + np.log(100) * (shares - 0.5) / 0.3
    assert bd_rate(ours, theirs).percent == pytest.approx(100 * (math.exp((mine - other).mean()) - 1), rel=1e-4)


def test_front_leaves_out_what_is_beaten() -> None:
    """More bytes for no more accuracy is no part of a curve; order of the points does not matter."""
    points = [Point(50, 0.7), Point(10, 0.5), Point(60, 0.7), Point(40, 0.4), Point(70, 0.9), Point(10, 0.45)]
    assert front(points) == [Point(10, 0.5), Point(50, 0.7), Point(70, 0.9)]


def test_better_than_all_of_theirs() -> None:
    """Where ours begins above their best, our cheapest point is compared with that best."""
    found = bd_rate([Point(30, 0.95), Point(90, 0.96)], [Point(50, 0.8), Point(120, 0.9)])
    assert found.percent == pytest.approx(-75)
    assert (found.low, found.high) == (0.9, 0.9)


def test_one_point_is_compared_at_its_accuracy() -> None:
    """A family with one codec: its bytes against theirs at that accuracy."""
    found = bd_rate([Point(25, 0.7)], curve(1e-5, [0.6, 0.7, 0.8]))
    assert found.percent == pytest.approx(100 * (25 / 100 - 1))
    assert bd_rate(curve(1e-5, [0.6, 0.7, 0.8]), [Point(25, 0.7)]).percent == pytest.approx(300)


def test_worse_than_all_of_theirs_is_undefined() -> None:
    """No bytes give their accuracy: there is no figure, and none is made up."""
    assert bd_rate([Point(1, 0.3), Point(2, 0.4)], [Point(50, 0.8), Point(120, 0.9)]).percent is None
