"""The short form of `kinflow bench chaos`: real servers killed, frozen, cut and restarted under real devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinflow_bench import chaos
from kinflow_bench.chaos_faults import ALL
from system_fixtures import FASHION, SAMPLES

# On a machine that is busy with something else an answer may be that late for want of a processor alone.
BUSY_MS = 1000.0


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_every_inference_is_answered_once_rightly_and_in_time() -> None:
    """Whatever fails: as many answers as inferences, each its own member's, what is degraded says why."""
    said: list[str] = []
    figures = chaos.run(FASHION / "bundle", SAMPLES, chaos.SHORT, said.append)
    assert figures["answered"] == figures["inferences"] >= chaos.SHORT.inferences
    assert figures["wrong"] == 0, figures["wrong_examples"]
    assert figures["total_ms"]["max"] < figures["deadline_ms"] + BUSY_MS
    assert figures["unexplained"] == 0
    assert figures["faults"] == len(chaos.SHORT.faults) == len(said), figures["left_out"]
    waiting = figures["eventually"]
    assert waiting["answered"] == waiting["handed_in"] > 0
    assert waiting["left"] == 0
    assert figures["recovery_s"]["never"] == 0, said
    assert set(figures["tiers"]) == {"device", "edge", "cloud"}
    for before_mb, after_mb in zip(*figures["device_memory_mb"].values(), strict=True):
        assert after_mb < before_mb + 15


def test_the_full_plan_has_every_fault_and_as_many_as_asked() -> None:
    """In another order for another seed."""
    plan = chaos.full(50, 20_000, 20, seed=1)
    assert len(plan.faults) >= 50
    assert set(plan.faults) == set(ALL)
    assert plan.faults != chaos.full(50, 20_000, 20, seed=2).faults
