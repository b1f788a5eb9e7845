"""The audit's test: seldom wrong however often it is looked at, and quick when the risk is really higher."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from brokers import wait_until
from kinflow.audit import RiskTest
from kinflow.device import Device
from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow.fleet import Fleet
from kinflow.settings import DeviceSettings
from system_fixtures import FASHION, copy_bundle, member_answer, sample_images


def first_refutation(losses: np.ndarray, epsilon: float, delta: float) -> int | None:
    """After how many losses the certificate is refuted."""
    test = RiskTest(epsilon, delta)
    for number, loss in enumerate(losses):
        test.observe(float(loss))
        if not test.audit.holds:
            return number + 1
    return None


def test_a_certificate_that_holds_is_seldom_refuted_however_often_one_looks() -> None:
    """At the very limit, looked at after each of 600 losses, in 100 runs: at most delta of them, and luck."""
    random = np.random.default_rng(0)
    runs = [first_refutation(random.random(600) < 0.05, 0.05, 0.1) for _ in range(100)]
    # 10% of 100 are 10; more than 20 happen once in a thousand times.
    assert sum(run is not None for run in runs) <= 20


def test_a_risk_three_times_too_high_is_noticed() -> None:
    """Within a few thousand images at half a percent, by all of 20 runs; the lower bound is below the truth."""
    random = np.random.default_rng(1)
    for _ in range(20):
        found = first_refutation(random.random(8000) < 0.015, 0.005, 0.05)
        assert found is not None


def test_the_lower_bound_is_one() -> None:
    """It grows with what is seen, and stays below the true risk in 19 of 20 runs, give or take."""
    random = np.random.default_rng(2)
    above = 0
    bounds = []
    for _ in range(20):
        test = RiskTest(0.01, 0.05)
        for loss in random.random(3000) < 0.04:
            test.observe(float(loss))
        audit = test.audit
        assert audit.n == 3000
        assert audit.risk == pytest.approx(0.04, abs=0.015)
        above += audit.at_least > 0.04
        bounds.append(audit.at_least)
    assert above <= 3
    assert np.median(bounds) >= 0.02


def test_losses_between_nought_and_one_count_as_what_they_are() -> None:
    """Half losses twice as often are the same risk: not refuted at its own mean."""
    test = RiskTest(0.1, 0.05)
    for number in range(2000):
        test.observe(0.5 if number % 5 == 0 else 0.0)
    assert test.audit.holds
    assert test.audit.risk == pytest.approx(0.1)


def test_a_device_whose_certificate_does_not_hold_tightens_its_threshold_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept without any confidence, answers differ from the edge's far too often: noticed from what is compared."""
    bundle = copy_bundle(tmp_path / "bundle", thresholds={"device": 0.0, "edge": 0.0})
    family = Family.load(bundle)
    own, above = (
        [member_answer(family, name, image)[0] for image in sample_images(600)] for name in ("device", "edge")
    )
    images = sample_images(600)[np.array(own) != np.array(above)]
    assert len(images)
    with Fleet([bundle]) as fleet, caplog.at_level(logging.WARNING, "kinflow.device"):
        server = fleet.start("edge")
        settings = DeviceSettings(broker=server.broker, audit_share=1.0)
        with Device.open(bundle, settings) as device:
            assert device.wait_for_server(15)
            answer = device.infer(images[0])
            assert (answer.tier, answer.degraded) == ("device", False)
            assert device.audit is not None
            # Only what the edge answers otherwise is asked: that no certificate allows.
            assert device._auditor is not None
            numbers = iter(range(100_000))
            wait_until(lambda: _ask(device, images[next(numbers) % len(images)]) and device.threshold > 0.0, 60)
            assert device._auditor.refuted >= 1
    assert any("certificate refuted" in record.getMessage() for record in caplog.records)


def _ask(device: Device, image: np.ndarray) -> bool:
    """One image, and its comparison."""
    import time

    device.infer(image)
    time.sleep(0.06)
    return True


def test_an_audit_needs_a_certificate_and_somebody_to_ask() -> None:
    """Said when the device is made, not found out later."""
    with pytest.raises(SettingsError, match=r"audit_share is 0\.1"):
        Device.open(FASHION / "bundle", DeviceSettings(audit_share=0.1, offload=False))
