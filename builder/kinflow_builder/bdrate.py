"""BD-rate: how many bytes fewer (negative) or more at equal accuracy, as the mean over two curves. Pure.

G. Bjontegaard, "Calculation of average PSNR differences between RD-curves", ITU-T VCEG-M33, 2001, with accuracy in
the place of PSNR and piecewise cubic interpolation that does not overshoot (PCHIP; Fritsch and Carlson, SIAM J.
Numer. Anal. 17, 1980) in the place of the cubic fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.interpolate import PchipInterpolator


@dataclass(frozen=True)
class Point:
    """Mean bytes sent per image, and the share of right answers."""

    bytes_mean: float
    top1: float


@dataclass(frozen=True)
class BdRate:
    """`percent` is None where even the best of ours is below the worst of theirs."""

    percent: float | None
    low: float
    """The accuracies, as shares, between which was averaged; equal where it was compared at one."""
    high: float


PointType = TypeVar("PointType", bound=Point)


def front(points: Sequence[PointType]) -> list[PointType]:
    """Those that no other one beats with as few bytes; fewest bytes first, so that accuracy rises strictly."""
    found: list[PointType] = []
    for point in sorted(points, key=lambda point: (point.bytes_mean, -point.top1)):
        if not found or point.top1 > found[-1].top1:
            found.append(point)
    return found


def bd_rate(ours: Sequence[Point], theirs: Sequence[Point]) -> BdRate:
    """Percent of `theirs`: exp(mean of (ln bytes of ours - ln bytes of theirs)) - 1, over the accuracies of both.

    Both curves are their fronts. Where all of ours is above the best of theirs, our cheapest point is compared with
    that best: ours does more there, so the figure understates the saving.
    """
    mine, other = front(ours), front(theirs)
    low, high = max(mine[0].top1, other[0].top1), min(mine[-1].top1, other[-1].top1)
    if low < high:
        mean = (_area(mine, low, high) - _area(other, low, high)) / (high - low)
        return BdRate(100.0 * math.expm1(mean), low, high)
    if mine[-1].top1 < other[0].top1:
        return BdRate(None, low, high)
    at = min(low, other[-1].top1)
    ratio = _bytes_for(mine, at) / _bytes_for(other, at)
    return BdRate(100.0 * (ratio - 1.0), at, at)


def _bytes_for(curve: Sequence[Point], top1: float) -> float:
    """Bytes at which the curve reaches `top1`; its cheapest point's where that is better still."""
    if top1 <= curve[0].top1:
        return curve[0].bytes_mean
    return math.exp(float(_interpolator(curve)(top1)))


def _area(curve: Sequence[Point], low: float, high: float) -> float:
    return float(_interpolator(curve).integrate(low, high))


def _interpolator(curve: Sequence[Point]) -> PchipInterpolator:
    return PchipInterpolator([point.top1 for point in curve], np.log([point.bytes_mean for point in curve]))
