"""Temperature and certificates, against direct computation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install 'kinflow[builder]'")

from kinflow.confidence import probabilities
from kinflow_builder.calibrate import THRESHOLDS, certify, gap, p_value, temperature


def exact_tail(losses: int, n: int, epsilon: float) -> float:
    """P(at most `losses` of n), term by term in exact integers and one rounding."""
    return math.fsum(
        math.comb(n, k) * math.exp(k * math.log(epsilon) + (n - k) * math.log1p(-epsilon)) for k in range(losses + 1)
    )


@pytest.mark.parametrize(("losses", "n", "epsilon"), [(0, 299, 0.01), (3, 500, 0.02), (12, 900, 0.01)])
def test_p_value_is_the_binomial_tail(losses: int, n: int, epsilon: float) -> None:
    """The p-value equals the sum of the binomial terms."""
    assert p_value(losses, n, epsilon) == pytest.approx(exact_tail(losses, n, epsilon), rel=1e-9)


def test_fewest_samples() -> None:
    """1% at 5% needs 299 samples without a loss, as known from tables; 298 certify nothing."""
    confidence = np.ones(299)
    losses = np.zeros(299, bool)
    assert certify(confidence, losses, 0.01, 0.05).threshold == 0.0
    nothing = certify(confidence[:298], losses[:298], 0.01, 0.05)
    assert (nothing.threshold, nothing.kept_share) == (1.0, 0.0)


def test_returns_the_last_certified_threshold() -> None:
    """Testing stops at the first threshold that fails, and the one before it is returned."""
    confidence = np.repeat([0.95, 0.75, 0.35], [500, 500, 500])
    losses = np.zeros(1500, bool)
    losses[500:1000:10] = True  # 50 losses at 0.75: far too many for 1%
    found = certify(confidence, losses, 0.01, 0.05)
    # 0.755 keeps none of them, 0.75 all: the last certified one is just above.
    assert found.threshold == 0.755
    assert found.kept_share == pytest.approx(1 / 3)
    assert found.n == 1500


def test_safe_again_below_a_failure_does_not_count() -> None:
    """Fixed-sequence testing never goes past a failure, however good the rest looks."""
    confidence = np.repeat([0.9, 0.2], [1000, 99_000])
    losses = np.zeros(100_000, bool)
    losses[:1000] = True
    assert certify(confidence, losses, 0.005, 0.05).threshold > 0.9


def test_nothing_is_certified_without_safety() -> None:
    """Where every answer is a loss at full confidence, nothing is kept."""
    found = certify(np.full(1000, 0.9999), np.ones(1000, bool), 0.01, 0.05)
    assert found.threshold == 1.0
    found = certify(np.full(1000, 1.0), np.ones(1000, bool), 0.01, 0.05)
    assert found.kept_share == 0.0


def test_order_of_thresholds() -> None:
    """From the safest down to the one that keeps everything."""
    assert THRESHOLDS[0] == 1.0
    assert THRESHOLDS[-1] == 0.0
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS), reverse=True)


def test_violations_stay_below_delta() -> None:
    """Over 200 random calibration sets the true risk exceeds epsilon at most as often as promised."""
    random = np.random.default_rng(1)
    epsilon, delta, splits = 0.02, 0.1, 200
    # A world whose true risk is known: the less sure, the likelier a loss.
    confidence = random.uniform(0, 1, 400_000)
    loss_rate = 0.15 * (1 - confidence)
    order = np.argsort(-confidence)
    true_risk = np.cumsum(loss_rate[order]) / len(confidence)
    violations = kept = 0
    for _ in range(splits):
        sample = random.integers(0, len(confidence), 1500)
        losses = random.uniform(size=1500) < loss_rate[sample]
        found = certify(confidence[sample], losses, epsilon, delta)
        count = int((confidence >= found.threshold).sum())
        violations += bool(count and true_risk[count - 1] > epsilon)
        kept += found.kept_share > 0.1
    spread = math.sqrt(delta * (1 - delta) / splits)
    assert violations / splits <= delta + 2 * spread
    # Not by keeping nothing: the certificate is of use, and it does use what it may.
    assert kept == splits


def test_temperature_is_found_again() -> None:
    """Labels drawn from softmax(logits / T) give that T back, and its likelihood beats its neighbours'."""
    random = np.random.default_rng(2)
    logits = random.normal(0, 4, (20_000, 10)).astype(np.float32)
    cumulative = probabilities(logits, 2.5).cumsum(axis=1)
    labels = (random.uniform(size=(20_000, 1)) > cumulative).sum(axis=1).clip(max=9)
    assert temperature(logits, labels) == pytest.approx(2.5, rel=0.03)


def test_a_few_right_answers_make_nobody_certain() -> None:
    """Sixty images, all told rightly by a wide margin: the temperature does not run away to its smallest value."""
    labels = np.arange(60) % 3
    logits = (4.0 * np.eye(3)[labels]).astype(np.float32)
    assert 0.3 < temperature(logits, labels) < 1.0


def test_gap_counts_only_what_the_last_exit_knows() -> None:
    """A loss is an answer that is wrong where the last exit's is right, nothing else."""
    right, wrong = [0.0, 1.0], [1.0, 0.0]
    here = np.array([right, wrong, right, wrong], np.float32)
    last = np.array([right, right, wrong, wrong], np.float32)
    np.testing.assert_array_equal(gap(here, last, np.ones(4, np.int64)), [False, True, False, False])
