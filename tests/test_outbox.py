"""Store and forward: what no server could answer waits on the disk, and is answered once when one can."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brokers import wait_until
from kinflow.answer import Answer, Timings
from kinflow.device import Device
from kinflow.errors import InputError, OutboxError, SettingsError
from kinflow.fleet import Fleet
from kinflow.outbox import Entry, Outbox
from kinflow.settings import DeviceSettings
from system_fixtures import LOOPBACK, copy_bundle, member_answer, sample_images

IMAGES = sample_images(6)
OWN = Answer(
    label="Bag",
    index=8,
    confidence=0.4,
    tier="device",
    exit="device",
    degraded=True,
    reason="nobody",
    bytes_up=0,
    bytes_down=0,
    total_ms=1.0,
    timings=Timings(1.0),
    request_id="00" * 16,
)


def entry(number: int, version: str = "1") -> Entry:
    return Entry(bytes([number]) * 16, "fashion", version, "s1", "s1-q4", bytes([number]) * 9, OWN)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def never_sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device is never sure, the edge always."""
    return copy_bundle(tmp_path_factory.mktemp("unsure") / "bundle", thresholds={"device": 1.0, "edge": 0.0})


def settings(tmp_path: Path, port: int, **more: object) -> DeviceSettings:
    return DeviceSettings(broker=f"{LOOPBACK}:{port}", outbox=str(tmp_path / "outbox"), **more)  # type: ignore[arg-type]


def test_entries_keep_their_order_and_are_answered_and_taken_once(tmp_path: Path) -> None:
    """Oldest first; an answered one is not queued any more, a removed one is gone; all of it after reopening too."""
    path = tmp_path / "new" / "outbox"
    outbox = Outbox(path, 10)
    for number in range(3):
        outbox.put(entry(number))
    outbox.answered(entry(1).id, OWN)
    outbox.close()
    outbox = Outbox(path, 10)
    assert [found for _, found in outbox.queued(0, 10)] == [entry(0), entry(2)]
    (first_row, _), *_ = outbox.queued(0, 1)
    assert [found for _, found in outbox.queued(first_row, 10)] == [entry(2)]
    assert outbox.answers() == [(entry(1).id, OWN)]
    outbox.remove(entry(1).id)
    assert outbox.answers() == []
    assert len(outbox) == 2
    assert path.stat().st_mode & 0o077 == 0
    outbox.close()


def test_a_full_outbox_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    """More than the capacity is refused by name, and so is a file that is no outbox."""
    outbox = Outbox(tmp_path / "outbox", 2)
    outbox.put(entry(0))
    outbox.put(entry(1))
    with pytest.raises(OutboxError, match="2 entries already"):
        outbox.put(entry(2))
    outbox.close()
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 40)
    with pytest.raises(OutboxError, match="text"):
        Outbox(tmp_path / "text", 2)


def test_answers_come_when_a_server_does(tmp_path: Path, never_sure: Path) -> None:
    """Inputs submitted without a server wait; once one starts each future gets the edge member's own answer."""
    port = free_port()
    with Device.open(never_sure, settings(tmp_path, port, deadline_s=0.2)) as device:
        futures = [device.submit(image, when="eventually") for image in IMAGES]
        outbox = device._outbox
        assert outbox is not None
        wait_until(lambda: len(outbox) == len(IMAGES), 10)
        assert not any(future.done() for future in futures)
        with Fleet([never_sure]) as fleet:
            fleet.start("edge", "--port", str(port), "--no-advertise")
            answers = [future.result(30) for future in futures]
        assert len(outbox) == 0
        assert list(device.collect()) == []
    for image, answer in zip(IMAGES, answers, strict=True):
        assert (answer.tier, answer.degraded) == ("edge", False)
        assert answer.index == member_answer(device.family, "edge", image)[0]
        assert answer.reason == "it waited for a server"


SUBMIT = """
import sys
from kinflow.device import Device
from kinflow.settings import DeviceSettings
from system_fixtures import sample_images
bundle, broker, outbox = sys.argv[1:]
with Device.open(bundle, DeviceSettings(broker=broker, outbox=outbox, deadline_s=0.2)) as device:
    for image in sample_images(6):
        device.submit(image, when="eventually")
    while len(device._outbox) < 6:
        pass
    print("kept", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_loses_nothing(tmp_path: Path, never_sure: Path) -> None:
    """After kill -9 the next process sends what waited, and hands each answer out once."""
    port = free_port()
    command = [sys.executable, "-c", SUBMIT, str(never_sure), f"{LOOPBACK}:{port}", str(tmp_path / "outbox")]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    assert child.stdout.readline() == b"kept\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    answers: list[Answer] = []
    with Fleet([never_sure]) as fleet:
        fleet.start("edge", "--port", str(port), "--no-advertise")
        with Device.open(never_sure, settings(tmp_path, port)) as device:
            wait_until(lambda: answers.extend(device.collect()) or len(answers) >= len(IMAGES), 30)
            assert list(device.collect()) == []
    assert len({answer.request_id for answer in answers}) == len(IMAGES)
    expected = sorted(member_answer(device.family, "edge", image)[0] for image in IMAGES)
    assert sorted(answer.index for answer in answers) == expected


def test_what_waited_for_another_version_gets_the_devices_own_answer(tmp_path: Path, never_sure: Path) -> None:
    """No server of this version can continue features of another one: said, not kept for ever."""
    outbox = Outbox(tmp_path / "outbox", 5)
    outbox.put(entry(7, version="0.0.1"))
    outbox.close()
    with Device.open(never_sure, settings(tmp_path, free_port())) as device:
        answers: list[Answer] = []
        wait_until(lambda: answers.extend(device.collect()) or bool(answers), 10)
    assert answers[0].degraded
    assert "fashion 0.0.1" in answers[0].reason


def test_a_full_outbox_answers_at_once(tmp_path: Path, never_sure: Path) -> None:
    """What cannot be kept gets the device's own answer, degraded, with both reasons."""
    with Device.open(never_sure, settings(tmp_path, free_port(), deadline_s=0.2, outbox_size=1)) as device:
        waiting = device.submit(IMAGES[0], when="eventually")
        outbox = device._outbox
        assert outbox is not None
        wait_until(lambda: len(outbox) == 1, 10)
        answer = device.submit(IMAGES[1], when="eventually").result(10)
        assert answer.degraded
        assert "outbox: the outbox holds 1 entries already" in answer.reason
        assert not waiting.done()
    assert waiting.cancelled()


def test_bad_input_and_a_missing_setting_raise(tmp_path: Path, never_sure: Path) -> None:
    """A wrong image ends the future with its error; without `outbox` nothing can wait."""
    with Device.open(never_sure, settings(tmp_path, free_port())) as device, pytest.raises(InputError, match="shape"):
        device.submit(np.zeros((3, 3), np.uint8), when="eventually").result(10)
    without = DeviceSettings(broker=f"{LOOPBACK}:{free_port()}")
    with Device.open(never_sure, without) as device, pytest.raises(SettingsError, match="outbox"):
        device.submit(IMAGES[0], when="eventually")
