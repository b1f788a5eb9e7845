"""Confidence is the temperature-scaled softmax's largest value."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kinflow.confidence import MOST, probabilities, read

Logits = npt.NDArray[np.float32]
logits_arrays = hnp.arrays(np.float32, st.integers(2, 20), elements=st.floats(-50, 50, width=32))
temperatures = st.floats(0.05, 50)


def softmax(logits: Logits, temperature: float) -> list[float]:
    """The definition, term by term, in Python's floats."""
    scaled = [float(value) / temperature for value in logits]
    terms = [math.exp(value - max(scaled)) for value in scaled]
    return [term / math.fsum(terms) for term in terms]


@given(logits_arrays, temperatures)
def test_both_agree_with_the_definition(logits: Logits, temperature: float) -> None:
    """The label is the largest logit's, the confidence its softmax."""
    expected = softmax(logits, temperature)
    np.testing.assert_allclose(probabilities(logits, temperature), expected, rtol=1e-9, atol=1e-300)
    reading = read(logits, temperature)
    assert logits[reading.label] == logits.max()
    assert reading.confidence == pytest.approx(max(expected), rel=1e-4)
    assert 1 / len(logits) * (1 - 1e-4) <= reading.confidence <= 1


def test_scipy_says_the_same() -> None:
    """A whole batch, over the last axis."""
    special = pytest.importorskip("scipy.special", reason="scipy is not installed")
    logits = np.random.default_rng(0).normal(0, 5, (7, 10)).astype(np.float32)
    np.testing.assert_allclose(probabilities(logits, 1.7), special.softmax(logits.astype(float) / 1.7, axis=-1))


def test_the_limits_of_the_temperature() -> None:
    """Cold: the largest takes all. Hot: all classes are equal. One: the plain softmax."""
    logits = np.array([1.0, 3.0, 2.0, -4.0], np.float32)
    assert read(logits, 1e-3) == (1, MOST)
    assert MOST < 1.0
    assert read(logits, 1e6).confidence == pytest.approx(0.25, abs=1e-5)
    assert read(logits, 1.0).confidence == pytest.approx(np.exp(3) / np.exp(logits.astype(float)).sum())


def test_a_higher_temperature_never_raises_the_confidence() -> None:
    """And never changes the label."""
    logits = np.random.default_rng(1).normal(0, 3, 10).astype(np.float32)
    readings = [read(logits, temperature) for temperature in np.geomspace(0.01, 100, 50)]
    assert len({reading.label for reading in readings}) == 1
    confidences = [reading.confidence for reading in readings]
    assert confidences == sorted(confidences, reverse=True)


def test_large_logits_do_not_overflow() -> None:
    """Only differences count."""
    with np.errstate(all="raise", under="ignore"):
        assert read(np.array([3e4, 3e4 - 1], np.float32), 1.0).confidence == pytest.approx(0.731, abs=1e-3)
        assert probabilities(np.array([3e38, -3e38], np.float32), 1.0).tolist() == [1.0, 0.0]


def test_the_first_of_equals_wins() -> None:
    """A tie is decided the same way everywhere, and with the confidence of a tie."""
    assert read(np.zeros(4, np.float32), 2.0) == (0, 0.25)
