"""The rule that keeps or offloads, as a table of its cases."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kinflow import policy
from kinflow.estimate import LinkEstimate
from kinflow.manifest import Codec, Split
from kinflow.policy import CONFIDENT, Keep, NoRoute, Offload, Rate, Route, decide, rates

BIG, SMALL = Rate("q8", 850.0), Rate("q4", 350.0)
FAST = Route("edge-1", "edge", "s1", (BIG, SMALL), LinkEstimate(round_trip_s=0.010, queue_s=0.005))
# 10 ms for a kilobyte: 25 ms with the big codec, 20 ms with the small one.
SLOW = replace(FAST, node="edge-2", estimate=replace(FAST.estimate, s_per_byte=1e-5))
FAR = replace(FAST, node="cloud-1", tier="cloud", estimate=LinkEstimate(round_trip_s=0.018))
NONE = NoRoute("no server found yet")
SURE = Keep(CONFIDENT, degraded=False)
UNSURE = "confidence 0.40 is below 0.80"


@pytest.mark.parametrize(
    ("confidence", "threshold", "routes", "remaining_s", "decision"),
    [
        # Sure: kept, whatever is above and however much time is left.
        (0.9, 0.8, [FAST], 1.0, SURE),
        (0.9, 0.8, NONE, 1.0, SURE),
        (0.9, 0.8, [FAST], -1.0, SURE),
        (0.8, 0.8, [FAST], 1.0, SURE),
        (0.0, 0.0, [FAST], 1.0, SURE),
        (1.0, 1.0, [FAST], 1.0, SURE),
        # Unsure: offloaded where that fits.
        (0.4, 0.8, [FAST], 1.0, Offload(FAST, "q8", UNSURE)),
        (0.4, 0.8, [FAST], 0.015, Offload(FAST, "q8", UNSURE)),
        (0.7999, 0.8, [FAST], 1.0, Offload(FAST, "q8", "confidence 0.80 is below 0.80")),
        # The first in the order of resort that can make it; a slow link gets a smaller codec.
        (0.4, 0.8, [FAST, FAR], 1.0, Offload(FAST, "q8", UNSURE)),
        (0.4, 0.8, [SLOW], 1.0, Offload(SLOW, "q8", UNSURE)),
        (
            0.4,
            0.8,
            [SLOW, FAR],
            0.022,
            Offload(SLOW, "q4", f"{UNSURE}; q4, since edge-2 needs about 25 ms for q8, 22 ms are left"),
        ),
        (0.4, 0.8, [SLOW, FAR], 0.019, Offload(FAR, "q8", UNSURE)),
        # Unsure, and nothing can help in time.
        (0.4, 0.8, NONE, 1.0, Keep("no server found yet", degraded=True)),
        (0.4, 0.8, [FAST], 0.0149, Keep("edge-1 needs about 15 ms for q8, 15 ms are left", degraded=True)),
        (0.4, 0.8, [FAST], 0.0, Keep("edge-1 needs about 15 ms for q8, 0 ms are left", degraded=True)),
        (0.4, 0.8, [SLOW, FAR], -2.0, Keep("edge-2 needs about 25 ms for q8, 0 ms are left", degraded=True)),
    ],
)
def test_each_case(
    confidence: float,
    threshold: float,
    routes: Sequence[Route] | NoRoute,
    remaining_s: float,
    decision: policy.Decision,
) -> None:
    """Sure stays; unsure goes to the first server that can answer in time; else it stays, degraded."""
    assert decide(confidence, threshold, routes, remaining_s) == decision


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10), st.floats(0, 10), st.floats(-1, 10))
def test_the_rule_holds_everywhere(
    confidence: float, threshold: float, round_trip_s: float, queue_s: float, remaining_s: float
) -> None:
    """What is offloaded was unsure and fits; what is degraded was unsure and does not; each has a reason."""
    route = Route("edge-1", "edge", "s1", (BIG,), LinkEstimate(round_trip_s, queue_s=queue_s))
    decision = decide(confidence, threshold, [route], remaining_s)
    unsure = confidence < threshold
    fits = round_trip_s + queue_s <= remaining_s
    assert isinstance(decision, Offload) == (unsure and fits)
    if isinstance(decision, Keep):
        assert decision.degraded == unsure
    assert decision.reason


def test_rates_are_the_default_and_what_is_smaller() -> None:
    """By size, largest first; a codec that the settings name stands alone."""
    codecs = {
        name: Codec("uniform", 8, [1.0], [0], None, size)
        for name, size in {"tiny": 10.0, "default": 100.0, "huge": 900.0, "small": 50.0}.items()
    }
    split = Split([1, 1, 1], codecs, "default")
    assert rates(split) == (Rate("default", 100.0), Rate("small", 50.0), Rate("tiny", 10.0))
    assert rates(split, "huge") == (Rate("huge", 900.0),)


def test_the_module_is_pure() -> None:
    """No socket, clock, thread or environment: it imports nothing that has one."""
    tree = ast.parse(inspect.getsource(policy))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {
        "__future__",
        "collections.abc",
        "kinflow.estimate",
        "kinflow.manifest",
        "kinflow.messages",
        "msgspec",
    }
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
