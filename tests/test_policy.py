"""The rule that keeps or offloads, as a table of its cases."""

from __future__ import annotations

import ast
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinflow import policy
from kinflow.policy import CONFIDENT, Keep, LinkEstimate, NoRoute, Offload, Route, decide

FAST = Route("edge-1", "edge", "s1", "q8", LinkEstimate(round_trip_s=0.010, queue_s=0.005))
NONE = NoRoute("no server found yet")
SURE = Keep(CONFIDENT, degraded=False)
UNSURE = "confidence 0.40 is below 0.80"


@pytest.mark.parametrize(
    ("confidence", "threshold", "route", "remaining_s", "decision"),
    [
        # Sure: kept, whatever is above and however much time is left.
        (0.9, 0.8, FAST, 1.0, SURE),
        (0.9, 0.8, NONE, 1.0, SURE),
        (0.9, 0.8, FAST, -1.0, SURE),
        (0.8, 0.8, FAST, 1.0, SURE),
        (0.0, 0.0, FAST, 1.0, SURE),
        (1.0, 1.0, FAST, 1.0, SURE),
        # Unsure: offloaded where that fits.
        (0.4, 0.8, FAST, 1.0, Offload(FAST, UNSURE)),
        (0.4, 0.8, FAST, 0.015, Offload(FAST, UNSURE)),
        (0.7999, 0.8, FAST, 1.0, Offload(FAST, "confidence 0.80 is below 0.80")),
        # Unsure, and nothing can help in time.
        (0.4, 0.8, NONE, 1.0, Keep("no server found yet", degraded=True)),
        (0.4, 0.8, FAST, 0.0149, Keep("edge-1 needs about 15 ms, 15 ms are left", degraded=True)),
        (0.4, 0.8, FAST, 0.004, Keep("edge-1 needs about 15 ms, 4 ms are left", degraded=True)),
        (0.4, 0.8, FAST, 0.0, Keep("edge-1 needs about 15 ms, 0 ms are left", degraded=True)),
        (0.4, 0.8, FAST, -2.0, Keep("edge-1 needs about 15 ms, 0 ms are left", degraded=True)),
    ],
)
def test_each_case(
    confidence: float,
    threshold: float,
    route: Route | NoRoute,
    remaining_s: float,
    decision: policy.Decision,
) -> None:
    """Sure stays; unsure goes up if there is a server and it can answer in time; else it stays, degraded."""
    assert decide(confidence, threshold, route, remaining_s) == decision


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 10), st.floats(0, 10), st.floats(-1, 10))
def test_the_rule_holds_everywhere(
    confidence: float, threshold: float, round_trip_s: float, queue_s: float, remaining_s: float
) -> None:
    """What is offloaded was unsure and fits; what is degraded was unsure and does not; each has a reason."""
    route = Route("edge-1", "edge", "s1", "q8", LinkEstimate(round_trip_s, queue_s))
    decision = decide(confidence, threshold, route, remaining_s)
    unsure = confidence < threshold
    fits = round_trip_s + queue_s <= remaining_s
    assert isinstance(decision, Offload) == (unsure and fits)
    if isinstance(decision, Keep):
        assert decision.degraded == unsure
    assert decision.reason


def test_the_queue_counts() -> None:
    """A near server with a long queue is as late as a far one."""
    assert LinkEstimate(round_trip_s=0.01, queue_s=0.5).expected_s == pytest.approx(0.51)


def test_the_module_is_pure() -> None:
    """No socket, clock, thread or environment: it imports nothing that has one."""
    tree = ast.parse(inspect.getsource(policy))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "msgspec", "kinflow.messages"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
