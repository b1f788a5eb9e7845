"""Medians of interleaved runs: the two sides of a ratio see the same machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

PACKAGES = ("kinflow", "numpy", "onnxruntime", "paho-mqtt")


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call every side once a round, in turn; each returns its own figure. The warm-up's are thrown away."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(warm_up + rounds):
        for name, side in sides.items():
            figure = side()
            if round_ >= warm_up:
                figures[name].append(figure)
    return figures


def mean_ms(call: Callable[[], Any], calls: int) -> float:
    """Mean milliseconds of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e3 / calls


def spread(values: list[float]) -> dict[str, float]:
    """What is needed to judge a median."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
