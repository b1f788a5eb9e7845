"""The three processes by hand, as an installation would: commands, settings files, ports, signals, and one app."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import kinflow
from brokers import KINDS, wait_until
from kinflow.family import Family
from system_fixtures import LOOPBACK, SAMPLES, copy_bundle, halving_threshold, member_answer, running, sample_images


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device never keeps an answer, the edge keeps half of the first 60."""
    thresholds = {"device": 1.0, "edge": halving_threshold(60)}
    return copy_bundle(tmp_path_factory.mktemp("system") / "bundle", thresholds=thresholds)


def settings_file(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_three_commands_and_three_settings_files(kind: str, trio: Path, tmp_path: Path) -> None:
    """Cloud, edge with its upstream, and `kinflow run`, each from TOML: every answer is its tier's own member's."""
    cloud_toml = settings_file(
        tmp_path / "cloud.toml",
        f'bundles = ["{trio}"]\nnode = "top"\nadvertise = false\n[broker]\nkind = "{kind}"\nport = 0\n',
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(running("cloud", "--settings", cloud_toml, "--json")).ready()
        assert (cloud["node"], cloud["tier"], cloud["broker_kind"]) == ("top", "cloud", kind)
        assert cloud["families"] == [f"{Family.load(trio).id} {Family.load(trio).version}"]
        edge_toml = settings_file(
            tmp_path / "edge.toml",
            f'bundles = ["{trio}"]\nnode = "unused"\nupstream = "{cloud["broker"]}"\nadvertise = false\n'
            f'batch_size = 4\n[broker]\nkind = "{kind}"\nport = 0\n',
        )
        edge_run = stack.enter_context(running("edge", "--settings", edge_toml, "--node", "near", "--json"))
        edge = edge_run.ready()
        assert (edge["node"], edge["upstream"]) == ("near", cloud["broker"])  # the flag overrides its key
        wait_for_upstream(trio, edge["broker"])
        device_toml = settings_file(tmp_path / "device.toml", f'broker = "{edge["broker"]}"\ndeadline_s = 5.0\n')
        run = stack.enter_context(
            running("run", str(SAMPLES), "--bundle", str(trio), "--settings", device_toml, "--limit", "60", "--json")
        )
        assert run.wait() == 0, run.err[-5:]
        answers = [json.loads(line) for line in run.out]
        edge_run.process.send_signal(signal.SIGTERM)
        assert edge_run.wait() == 0
        stopped = json.loads(edge_run.out[-1])
        assert stopped["event"] == "stopped"
        assert stopped["counts"]["served"] >= 60
        assert edge_run.gone()
    assert {answer["tier"] for answer in answers} == {"edge", "cloud"}
    assert not any(answer["degraded"] for answer in answers)
    family = Family.load(trio)
    for answer, image in zip(answers, sample_images(60), strict=True):
        label, confidence = member_answer(family, answer["tier"], image)
        assert answer["label"] == family.labels[label]
        assert answer["confidence"] == pytest.approx(confidence, abs=1e-5)


def wait_for_upstream(bundle: Path, broker: str) -> None:
    """Until the edge server has found its cloud server: what comes before is degraded."""
    image = next(
        image
        for image in sample_images()
        if member_answer(Family.load(bundle), "edge", image)[1] < Family.load(bundle).manifest.exits["edge"].threshold
    )
    settings = kinflow.DeviceSettings(broker=broker, deadline_s=5.0)
    with kinflow.Device.open(bundle, settings) as device:
        assert device.wait_for_server(15)
        wait_until(lambda: device.infer(image).tier == "cloud")


@pytest.mark.parametrize("role", ["edge", "cloud"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_stops_when_it_is_told(role: str, number: signal.Signals, trio: Path) -> None:
    """systemd's SIGTERM and Ctrl-C: status 0, a last line with its counts, no process left, its port free."""
    with running(role, str(trio), "--port", "0", "--no-advertise", "--json") as run:
        ready = run.ready()
        assert ready["tier"] == role
        run.process.send_signal(number)
        assert run.wait(20) == 0
        assert json.loads(run.out[-1]) == {"event": "stopped", "counts": {}}
        assert run.err == []
        assert run.gone()
    host, _, port = ready["broker"].rpartition(":")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), timeout=1).close()


def test_people_get_sentences(trio: Path) -> None:
    """Without --json: one line when ready with the address, one at the end."""
    with running("cloud", str(trio), "--port", "0", "--no-advertise", "--node", "attic") as run:
        run.line(r"cloud server 'attic' is ready: \w+ broker at 127\.0\.0\.1:\d+")
        run.process.terminate()
        assert run.wait(20) == 0
        assert run.out[-1] == "cloud server stopped: no requests"


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_server_on_the_same_port_says_so_in_one_line(kind: str, trio: Path) -> None:
    """Status 2, the port and the way out; the first one works on."""
    options = (str(trio), "--no-advertise", "--json", "--broker-kind", kind)
    with running("cloud", *options, "--port", "0") as first:
        port = first.ready()["broker"].rpartition(":")[2]
        with running("edge", *options, "--port", port) as second:
            assert second.wait(30) == 2
            assert second.out == []
            (line,) = second.err
            assert line.startswith(f"error: port {port} of {LOOPBACK} is in use")
            assert second.gone()
        assert first.process.poll() is None
        with running("edge", *options[:3], "--broker", f"{LOOPBACK}:{port}") as second:
            assert second.ready()["broker_kind"] == "external"


WRONG = {
    "no such bundle": (["edge", "nowhere"], "nowhere does not exist"),
    "unknown member": (["edge", "BUNDLE", "--member", "huge"], "not 'huge'"),
    "bad port": (["cloud", "BUNDLE", "--port", "70000"], "70000"),
    "bad node": (["cloud", "BUNDLE", "--node", "a/b"], "'a/b'"),
    "bad kind": (["cloud", "BUNDLE", "--broker-kind", "kafka"], "'kafka'"),
    "bad upstream": (["edge", "BUNDLE", "--port", "0", "--upstream", "host:port"], "host:port"),
    "foreign address": (["edge", "BUNDLE", "--listen", "203.0.113.7", "--port", "0", "--insecure-lan"], "203.0.113.7"),
    "no such settings": (["edge", "--settings", "missing.toml"], "missing.toml"),
    "nobody at the broker": (["edge", "BUNDLE", "--broker", "127.0.0.1:9"], "127.0.0.1:9 does not answer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str, trio: Path, tmp_path: Path) -> None:
    """Status 2, no traceback, the value that is wrong, and nothing left running."""
    command, said = WRONG[case]
    with running(*[str(trio) if word == "BUNDLE" else word for word in command], cwd=tmp_path) as run:
        assert run.wait(40) == 2
        assert len(run.err) == 1, run.err
        assert run.err[0].startswith("error: ")
        assert said in run.err[0]
        assert run.gone()


def test_an_unknown_key_in_a_settings_file_is_named(trio: Path, tmp_path: Path) -> None:
    """A typo must not pass as a default."""
    file = settings_file(tmp_path / "kinflow-edge.toml", f'bundles = ["{trio}"]\nbatchsize = 4\n')
    with running("edge", cwd=tmp_path) as run:
        assert run.wait(40) == 2
        assert "batchsize" in run.err[0]
        assert Path(file).name in run.err[0]


def test_the_readmes_five_lines(trio: Path) -> None:
    """An app names a bundle and nothing else: the edge server on this machine is found and its answer comes back."""
    with running("edge", str(trio), "--port", "0", "--json") as run:
        run.ready()
        settings = kinflow.DeviceSettings(interfaces=[LOOPBACK], deadline_s=5.0)
        with kinflow.Device.open(trio, settings) as device:
            assert device.wait_for_server(15)
            answer = device.infer(sample_images(1)[0])
        assert answer.tier == "edge"
        assert not answer.degraded
        # ... and with the server gone the same lines still give an answer.
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(20) == 0
        with kinflow.Device.open(trio, settings) as device:
            answer = device.infer(sample_images(1)[0])
        assert (answer.tier, answer.degraded) == ("device", True)


def test_thousands_of_offloads(trio: Path) -> None:
    """The server does not grow, no answer is late, and a broker that is killed in the end is got over."""
    images = sample_images(50)
    with running("edge", str(trio), "--port", "0", "--no-advertise", "--json") as run:
        ready = run.ready()
        settings = kinflow.DeviceSettings(broker=ready["broker"], deadline_s=1.0)
        with kinflow.Device.open(trio, settings) as device:
            assert device.wait_for_server(15)
            for number in range(300):
                device.infer(images[number % 50])
            before = resident_bytes(run.process.pid)
            late = [
                answer.total_ms
                for number in range(1500)
                if (answer := device.infer(images[number % 50])).total_ms > 1500
            ]
            assert late == []
            assert resident_bytes(run.process.pid) - before < 20e6
            os.kill(ready["broker_pid"], signal.SIGKILL)
            # Some wait for the new broker, some are answered here: none is late.
            assert max(device.infer(image).total_ms for image in images) <= 1500
            wait_until(lambda: device.infer(images[0]).tier == "edge", 20)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_garbage_does_not_stop_a_server(trio: Path) -> None:
    """Raw bytes on its broker's port and on its request topic: it counts what it could not read, and works on."""
    from kinflow import topics
    from kinflow.mqtt import BrokerAddress, Connection

    random = np.random.default_rng(0)
    with running("edge", str(trio), "--port", "0", "--no-advertise", "--json") as run:
        address = BrokerAddress.parse(run.ready()["broker"])
        for _ in range(20):
            with socket.create_connection((address.host, address.port), timeout=5) as raw:
                raw.sendall(random.bytes(300))
        topic = topics.request("edge", Family.load(trio).id, "s1", "vandal")
        with Connection(address, "vandal", on_message=lambda _topic, _data: None) as vandal:
            assert vandal.wait_connected(10)
            for size in (0, 1, 12, 100, 5000, 500_000):
                vandal.publish(topic, random.bytes(size))
        settings = kinflow.DeviceSettings(broker=str(address), deadline_s=5.0)
        with kinflow.Device.open(trio, settings) as device:
            assert device.wait_for_server(15)
            assert device.infer(sample_images(1)[0]).tier == "edge"
        run.process.terminate()
        assert run.wait(20) == 0
        counts = json.loads(run.out[-1])["counts"]
        assert counts["failed:frame"] == 6
        assert counts["served"] == 1
