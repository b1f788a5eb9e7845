"""Servers that come, go, stop and fail under devices that ask without pause: real processes on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from brokers import wait_until
from freezing import freeze
from kinflow.answer import Answer
from kinflow.device import Device
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from system_fixtures import LOOPBACK, copy_bundle, sample_images

IMAGES = sample_images(20)
DEADLINE_S = 2.0


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The device is never sure, every server always."""
    return copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 0.0})


class Asking:
    """A thread that asks one image after the other."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stop = threading.Event()
        self.answers: list[Answer] = []
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while not self._stop.is_set():
            self.answers.append(self._device.infer(IMAGES[len(self.answers) % len(IMAGES)]))

    @property
    def last_node(self) -> str:
        """Who answered last: a server's name, or `device`."""
        return node(self.answers[-1]) if self.answers else ""


def node(answer: Answer) -> str:
    return answer.timings.hops[0].node if answer.timings.hops else answer.tier


@contextmanager
def asking(device: Device) -> Iterator[Asking]:
    asker = Asking(device)
    asker._thread.start()
    try:
        yield asker
    finally:
        asker._stop.set()
        asker._thread.join()


def name(server: ServerProcess) -> str:
    return str(server.ready["node"])


def two_edges(fleet: Fleet) -> list[ServerProcess]:
    """They come up beside each other."""
    launched = [fleet.launch("edge", name=f"edge-{letter}") for letter in "ab"]
    return [fleet.wait(server) for server in launched]


def port(server: ServerProcess) -> str:
    return server.broker.rpartition(":")[2]


def test_a_rolling_restart_loses_nothing(bundle: Path) -> None:
    """Each of two edge servers is told to stop and started again, in turn: every answer is an edge server's."""
    with Fleet([bundle]) as fleet:
        servers = two_edges(fleet)
        brokers = ",".join(server.broker for server in servers)
        with Device.open(bundle, DeviceSettings(broker=brokers, deadline_s=DEADLINE_S)) as device:
            for server in servers:
                device_sees(device, name(server))
            with asking(device) as asker:
                for place, server in enumerate(list(servers)):
                    other = servers[1 - place]
                    wait_until(lambda: len(asker.answers) > 20)
                    server.process.send_signal(signal.SIGTERM)
                    assert server.process.wait(20) == 0
                    wait_until(lambda other=other: asker.last_node == name(other))
                    again = fleet.start("edge", "--port", port(server), name=f"{server.name}-again")
                    servers[place] = again
                    device_sees(device, name(again))
        degraded = [answer.reason for answer in asker.answers if answer.degraded or answer.tier != "edge"]
        assert degraded == []
        assert {node(answer) for answer in asker.answers} >= {name(server) for server in servers[:1]}


def device_sees(device: Device, node_name: str) -> None:
    assert device._uplink is not None
    uplink = device._uplink
    wait_until(lambda: any(peer.node == node_name and peer.status is not None for peer in uplink.peers))


def test_a_draining_server_answers_what_it_has_and_is_not_asked_again(bundle: Path) -> None:
    """A single server says draining, answers all that is under way, and only then goes; then answers are local."""
    with Fleet([bundle]) as fleet:
        server = fleet.start("edge")
        with Device.open(bundle, DeviceSettings(broker=server.broker, deadline_s=DEADLINE_S, workers=16)) as device:
            assert device.wait_for_server(15)
            futures = [device.submit(image) for image in IMAGES]
            server.process.send_signal(signal.SIGTERM)
            answers = [future.result(10) for future in futures]
            assert all(answer.tier == "edge" or answer.reason == f"{name(server)} is draining" for answer in answers), [
                answer.reason for answer in answers if answer.degraded
            ]
            assert server.process.wait(20) == 0
            assert device.infer(IMAGES[0]).degraded


def test_an_edge_server_that_is_killed_is_replaced_by_the_other_then_by_the_cloud(bundle: Path) -> None:
    """The order of resort, one kill -9 after the other: hardly an answer is local until nobody is left."""
    with Fleet([bundle]) as fleet:
        launched = fleet.launch("cloud")
        edges = {name(server): server for server in two_edges(fleet)}
        cloud = fleet.wait(launched)
        settings = DeviceSettings(
            broker=",".join(server.broker for server in edges.values()), cloud=cloud.broker, deadline_s=DEADLINE_S
        )
        with Device.open(bundle, settings) as device:
            for server in (*edges.values(), cloud):
                device_sees(device, name(server))
            with asking(device) as asker:
                wait_until(lambda: asker.last_node in edges)
                first = edges.pop(asker.last_node)
                os.kill(first.pid, signal.SIGKILL)
                (second,) = edges.values()
                wait_until(lambda: asker.last_node == name(second))
                os.kill(second.pid, signal.SIGKILL)
                wait_until(lambda: asker.last_node == name(cloud))
                local = [answer for answer in asker.answers if answer.tier == "device"]
                assert len(local) <= 4, [answer.reason for answer in local]
                os.kill(cloud.pid, signal.SIGKILL)
                wait_until(lambda: asker.last_node == "device")
        assert max(answer.total_ms for answer in asker.answers) < DEADLINE_S * 1e3 + 500
        assert all(answer.reason for answer in asker.answers if answer.degraded)


def test_a_new_edge_server_is_used(bundle: Path) -> None:
    """The device asks the cloud; an edge server is announced: no setting is touched, and it is asked.

    Within 3 s on a machine that is free (docs/reliability.md).
    """
    with Fleet([bundle]) as fleet:
        fleet.start("cloud")
        settings = DeviceSettings(interfaces=[LOOPBACK], deadline_s=DEADLINE_S)
        with Device.open(bundle, settings) as device, asking(device) as asker:
            wait_until(lambda: bool(asker.answers) and asker.answers[-1].tier == "cloud")
            edge = fleet.start("edge")
            wait_until(lambda: asker.last_node == name(edge), 15)


def test_a_frozen_server_is_hedged_around_and_used_again(bundle: Path) -> None:
    """Stopped in mid-air it is connected and mute: the other one answers in time; awake, it is used again."""
    with Fleet([bundle]) as fleet:
        servers = two_edges(fleet)
        names = {name(server): server for server in servers}
        brokers = ",".join(server.broker for server in servers)
        with Device.open(bundle, DeviceSettings(broker=brokers, deadline_s=DEADLINE_S)) as device:
            for server in servers:
                device_sees(device, name(server))
            with asking(device) as asker:
                wait_until(lambda: len(asker.answers) > 50)
                frozen = names.pop(asker.last_node)
                (other,) = names.values()
                before = len(asker.answers)
                freeze(frozen.pid)
                try:
                    wait_until(lambda: len(asker.answers) > before + 200)
                finally:
                    os.kill(frozen.pid, signal.SIGCONT)
                os.kill(other.pid, signal.SIGKILL)
                wait_until(lambda: asker.last_node == name(frozen), 15)
        answers = asker.answers[before : before + 200]
        assert [answer.reason for answer in answers if answer.degraded] == []
        assert any(f"{name(frozen)} was silent, {name(other)} was asked too" in answer.reason for answer in answers)


def get(server: ServerProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.ready['http']}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def health(server: ServerProcess) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kinflow", "health", "--at", server.ready["http"]]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_ready_means_that_inferences_succeed(bundle: Path) -> None:
    """With its broker frozen the server is live and its port is open, but it is not ready; thawed, it is again."""
    with Fleet([bundle]) as fleet:
        edge = fleet.start("edge")
        assert get(edge, "/live") == (200, '{"live": true}\n')
        status, body = get(edge, "/ready")
        assert (status, json.loads(body)["ready"], json.loads(body)["node"]) == (200, True, name(edge))
        said = health(edge)
        assert (said.returncode, said.stdout) == (0, f"edge server {name(edge)!r} is ready\n")
        freeze(edge.ready["broker_pid"])
        try:
            wait_until(lambda: get(edge, "/ready")[0] == 503, 40)
            assert "its own test inference fails" in json.loads(get(edge, "/ready")[1])["trouble"]
            assert get(edge, "/live")[0] == 200
            said = health(edge)
            assert said.returncode == 1
            assert said.stdout.startswith("not ready: its own test inference fails")
        finally:
            os.kill(edge.ready["broker_pid"], signal.SIGCONT)
        wait_until(lambda: get(edge, "/ready")[0] == 200, 40)
        assert get(edge, "/etc/passwd")[0] == 404
    assert health(edge).returncode == 1


def test_metrics_are_prometheus_and_count_requests(bundle: Path) -> None:
    """Requests by outcome, batches, queue and readiness; the way up where there is one."""
    parser = pytest.importorskip("prometheus_client.parser")
    with Fleet([bundle]) as fleet:
        cloud, edge = fleet.start_cloud_and_edge()
        with Device.open(bundle, DeviceSettings(broker=edge.broker, deadline_s=5.0)) as device:
            assert device.wait_for_server(15)
            for image in IMAGES[:7]:
                assert device.infer(image).tier == "edge"

        def read() -> dict[tuple[str, tuple[str, ...]], float]:
            return {
                (sample.name, tuple(sample.labels.values())): sample.value
                for family in parser.text_string_to_metric_families(get(edge, "/metrics")[1])
                for sample in family.samples
            }

        samples = read()
        assert samples["kinflow_requests_total", ("served",)] == 7
        assert samples["kinflow_ready", ()] == 1
        # The server's own test may just be under way.
        wait_until(lambda: read()["kinflow_under_way", ()] == 0)
        assert samples["kinflow_compute_seconds_total", ()] > 0
        assert any(labels[1:] == (name(cloud),) for _, labels in samples)


def test_a_port_that_is_in_use_is_named(bundle: Path) -> None:
    """The HTTP port of one server is refused to another, with the way out, and nothing is left of it."""
    with Fleet([bundle]) as fleet:
        edge = fleet.start("edge")
        taken = edge.ready["http"].rpartition(":")[2]
        with pytest.raises(Exception, match=f"{taken} cannot be bound.*--http-port"):
            fleet.start("cloud", "--http-port", taken)
