"""A board under strain offloads earlier, says so, and is not degraded where nobody else can answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kinflow.device import Device
from kinflow.fleet import Fleet, ServerProcess
from kinflow.policy import Strain, raise_threshold
from kinflow.settings import DeviceSettings
from system_fixtures import copy_bundle, sample_images

IMAGE = sample_images(1)[0]
NOBODY = "127.0.0.1:9"
HOT = Strain(1.0, "the board is at 85 °C of 80")


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose device member keeps about every answer."""
    return copy_bundle(tmp_path_factory.mktemp("sure") / "bundle", thresholds={"device": 0.5, "edge": 0.0})


@pytest.fixture(scope="module")
def edge(sure: Path) -> Iterator[ServerProcess]:
    with Fleet([sure]) as fleet:
        yield fleet.start("edge")


@pytest.mark.parametrize(("share", "raised"), [(0.0, 0.6), (0.5, 0.8), (1.0, 1.0)])
def test_the_threshold_only_rises(share: float, raised: float) -> None:
    """From the certificate's towards 1."""
    assert raise_threshold(0.6, Strain(share, "")) == pytest.approx(raised)


def test_under_strain_the_server_is_asked(sure: Path, edge: ServerProcess) -> None:
    """The same image is kept at ease and offloaded in the heat, with the reason; cooled down it is kept again."""
    strains = [Strain(0.0, ""), HOT, Strain(0.0, "")]
    settings = DeviceSettings(broker=edge.broker, deadline_s=5.0)
    with Device.open(sure, settings, strain=lambda: strains[len(answers)]) as device:
        assert device.wait_for_server(15)
        answers: list[object] = []
        hot = ("edge", "offloaded because the board is at 85")
        for tier, words in (("device", "confident"), hot, ("device", "confident")):
            answer = device.infer(IMAGE)
            answers.append(answer)
            assert (answer.tier, answer.degraded) == (tier, False)
            assert words in answer.reason


def test_a_sure_answer_without_a_server_is_not_degraded(sure: Path) -> None:
    """The certificate is met all the same; the reason tells of the heat and of the missing server."""
    with Device.open(sure, DeviceSettings(broker=NOBODY), strain=lambda: HOT) as device:
        answer = device.infer(IMAGE)
    assert (answer.tier, answer.degraded) == ("device", False)
    assert answer.reason.startswith("confident; kept although the board is at 85")


def test_an_unsure_answer_without_a_server_is_degraded_as_ever(sure: Path) -> None:
    """Strain excuses nothing below the certificate's threshold."""
    settings = DeviceSettings(broker=NOBODY, threshold=1.0)
    with Device.open(sure, settings, strain=lambda: HOT) as device:
        assert device.infer(IMAGE).degraded


def test_switched_off_offloading_is_not_asked_about(sure: Path) -> None:
    """A device that may not use the network keeps its answers, hot or not."""
    with Device.open(sure, DeviceSettings(offload=False), strain=lambda: HOT) as device:
        answer = device.infer(IMAGE)
    assert (answer.tier, answer.degraded, answer.reason) == ("device", False, "confident")
