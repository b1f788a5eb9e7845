"""What tests of the device have in common: images, and the device's own answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinflow.answer import Answer
from kinflow.family import Family
from system_fixtures import member_answer, sample_images

IMAGES = sample_images(40)
# How late an answer may be on a machine that is busy with something else; the product's own bound is 20 ms.
LATE_MS = 500.0


def local_answer(bundle: Path, number: int) -> tuple[int, float]:
    return member_answer(Family.load(bundle), "device", IMAGES[number])


def assert_local(answer: Answer, bundle: Path, number: int, deadline_s: float) -> None:
    """The device's own answer, said to be degraded and why, in time."""
    label, confidence = local_answer(bundle, number)
    assert (answer.tier, answer.exit, answer.index) == ("device", "device", label)
    assert answer.confidence == pytest.approx(confidence, abs=1e-5)
    assert answer.degraded
    assert answer.reason
    assert answer.total_ms <= deadline_s * 1e3 + LATE_MS
