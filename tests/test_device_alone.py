"""The device without a server, or with one that is silent, dies or serves something else: its own answer, in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import KINDS, wait_until
from brokers import running as running_broker
from device_site import IMAGES, LATE_MS, assert_local
from freezing import freeze
from kinflow.device import Device
from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from system_fixtures import LOOPBACK, copy_bundle, silent_broker

NOBODY = f"{LOOPBACK}:9"


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def edge(always_edge: Path) -> Iterator[ServerProcess]:
    """One edge server for the tests that do it no harm."""
    with Fleet([always_edge]) as fleet:
        yield fleet.start("edge")


def test_before_with_and_without_network_it_answers_locally(always_edge: Path) -> None:
    """A Device that was not entered starts nothing and still answers, degraded; offload=False is a choice."""
    threads = threading.active_count()
    device = Device.open(always_edge, DeviceSettings(broker=NOBODY))
    assert_local(device.infer(IMAGES[0]), always_edge, 0, 1.0)
    assert threading.active_count() == threads
    with pytest.raises(SettingsError, match="with block"):
        device.submit(IMAGES[0])
    alone = Device.open(always_edge, DeviceSettings(offload=False)).infer(IMAGES[0])
    assert (alone.tier, alone.degraded, alone.reason) == ("device", False, "offloading is switched off")


def test_nobody_at_the_broker_address(always_edge: Path) -> None:
    """No broker at all: local at once, and the reason names the address."""
    with Device.open(always_edge, DeviceSettings(broker=NOBODY)) as device:
        assert not device.wait_for_server(0.3)
        wait_until(lambda: NOBODY in device.infer(IMAGES[0]).reason)
        for number in range(3):
            answer = device.infer(IMAGES[number])
            assert_local(answer, always_edge, number, 0.0)
            assert NOBODY in answer.reason
            assert answer.bytes_up == 0


def test_a_broker_without_servers(always_edge: Path) -> None:
    """Connected, but nobody serves: no request is sent into the void."""
    with (
        running_broker(KINDS[0]) as broker,
        Device.open(always_edge, DeviceSettings(broker=str(broker.address))) as device,
    ):
        wait_until(lambda: device.infer(IMAGES[0]).reason == f"no server at {broker.address}")
        assert_local(device.infer(IMAGES[0]), always_edge, 0, 0.0)


def test_a_silent_broker(always_edge: Path) -> None:
    """It accepts the connection and never says a word: local answers, none of them waits."""
    with silent_broker() as address, Device.open(always_edge, DeviceSettings(broker=address)) as device:
        wait_until(lambda: address in device.infer(IMAGES[2], deadline_s=0.5).reason)
        give_up_s = time.monotonic() + 1.0
        while time.monotonic() < give_up_s:
            answer = device.infer(IMAGES[2], deadline_s=0.5)
            assert_local(answer, always_edge, 2, 0.0)
            assert address in answer.reason


@pytest.mark.parametrize("deadline_s", [0.1, 0.4])
def test_a_frozen_server_costs_one_deadline_and_no_more(always_edge: Path, deadline_s: float) -> None:
    """The server is stopped in mid-air, connected and mute: the answer comes at the deadline, and is local."""
    with Fleet([always_edge]) as fleet:
        server = fleet.start("edge")
        with Device.open(always_edge, DeviceSettings(broker=server.broker, deadline_s=deadline_s)) as device:
            assert device.wait_for_server(15)
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")
            freeze(server.pid)
            try:
                answer = device.infer(IMAGES[0])
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert_local(answer, always_edge, 0, deadline_s)
            assert answer.reason.startswith("timeout: ")
            assert answer.total_ms >= 0.8 * deadline_s * 1e3
            assert answer.bytes_up > 0
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")


def test_a_killed_server_is_missed_at_once_and_used_again_when_it_is_back(always_edge: Path) -> None:
    """Asked without pause while the server and its broker die: no answer is late; back on its port, it is used."""
    with Fleet([always_edge]) as fleet:
        server = fleet.start("edge")
        with Device.open(always_edge, DeviceSettings(broker=server.broker, deadline_s=1.0)) as device:
            assert device.wait_for_server(15)
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")
            killer = threading.Timer(0.2, os.kill, (server.pid, signal.SIGKILL))
            killer.start()
            answers = []
            give_up_s = time.monotonic() + 1.5
            while time.monotonic() < give_up_s:
                answers.append(device.infer(IMAGES[len(answers) % len(IMAGES)]))
            killer.join()
            assert max(answer.total_ms for answer in answers) <= 1e3 + LATE_MS
            assert answers[0].tier == "edge"
            for number, answer in enumerate(answers):
                if answer.tier == "device":
                    assert_local(answer, always_edge, number % len(IMAGES), 1.0)
            assert_local(answers[-1], always_edge, (len(answers) - 1) % len(IMAGES), 0.0)
            assert answers[-1].bytes_up == 0
            port = server.broker.rpartition(":")[2]
            assert fleet.news()
            fleet.start("edge", "--port", port, name="edge-again")
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge", 20)


def test_a_server_of_another_version_is_not_asked(always_edge: Path, edge: ServerProcess, tmp_path: Path) -> None:
    """The device's bundle is newer than the server's: degraded, with both versions in the reason."""
    family = Family.load(always_edge)
    newer = copy_bundle(tmp_path / "newer", family=family.id, version="9.9.9", thresholds={"device": 1.0})
    with Device.open(newer, DeviceSettings(broker=edge.broker)) as device:
        wait_until(lambda: family.version in device.infer(IMAGES[0]).reason)
        answer = device.infer(IMAGES[0])
        assert_local(answer, newer, 0, 0.0)
        assert f"{family.id} {family.version}" in answer.reason
        assert "9.9.9" in answer.reason
        assert answer.bytes_up == 0
        assert not device.wait_for_server(0.1)


def test_a_server_of_another_family_is_not_asked(always_cloud: Path, edge: ServerProcess) -> None:
    """As above, with a family that the server has never heard of."""
    with Device.open(always_cloud, DeviceSettings(broker=edge.broker)) as device:
        wait_until(lambda: "does not serve" in device.infer(IMAGES[0]).reason)
        assert_local(device.infer(IMAGES[0]), always_cloud, 0, 0.0)
