"""`kinflow device` as a process: answers out by every way, MQTT and Home Assistant over a real broker, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import brokers
from conftest import ROOT
from kinflow.mqtt import Connection
from kinflow.runtime import homeassistant
from kinflow.settings import MqttSettings
from system_fixtures import running, sample_images

ENTITIES = ["answer", "confidence", "online", "temperature", "tier"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six of the committed images as PNG files."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(sample_images(6)):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def broker() -> Iterator[brokers.TestBroker]:
    if not brokers.KINDS:
        pytest.skip("neither mosquitto nor iotcore is installed")
    with brokers.running(brokers.KINDS[0]) as started:
        yield started


class Listener:
    """Everything that is said on the broker, the last payload by topic."""

    def __init__(self, broker: brokers.TestBroker) -> None:
        self.last: dict[str, bytes] = {}
        self.seen: list[tuple[str, bytes]] = []
        self.connection = Connection(
            broker.address,
            f"listener-{os.urandom(4).hex()}",
            on_message=self._hear,
            subscriptions=["kinflow/device/#", "homeassistant/#"],
        )

    def __enter__(self) -> Listener:
        self.connection.start()
        assert self.connection.wait_connected(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _hear(self, topic: str, data: memoryview) -> None:
        payload = bytes(data)
        self.last[topic] = payload
        self.seen.append((topic, payload))

    def configs(self) -> dict[str, bytes]:
        return {topic.split("/")[3]: text for topic, text in self.seen if topic.endswith("/config")}


def test_a_folder_goes_to_standard_output_and_a_file(photos: Path, fashion: Path, tmp_path: Path) -> None:
    """One JSON line per picture in order; status 0 at the end of the folder."""
    out = tmp_path / "answers.jsonl"
    for output in ("-", str(out)):
        words = (f"folder:{photos}", "--bundle", str(fashion), "--rate", "0", "--local", "--output", output)
        with running("device", *words) as run:
            assert run.wait() == 0, run.err
            lines = run.out
    assert lines == []
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["frame"] for each in said] == [f"{index}.png" for index in range(6)]
    assert all(each["tier"] == "device" and 0 < each["confidence"] <= 1 for each in said)


def test_home_assistant_gets_the_device_and_its_end(photos: Path, fashion: Path, broker: brokers.TestBroker) -> None:
    """Five entities, the last answer and online are retained; again at Home Assistant's birth; offline on SIGTERM."""
    words = (f"watch:{photos}", "--bundle", str(fashion), "--rate", "0", "--local", "--name", "porch", "--output", "")
    with Listener(broker) as home:
        with running("device", *words, "--mqtt", str(broker.address), "--home-assistant") as run:
            brokers.wait_until(lambda: home.last.get("kinflow/device/porch/online") == b"online", 60)
            Image.fromarray(sample_images(7)[6]).save(photos / f"new-{os.getpid()}.png")
            brokers.wait_until(lambda: "kinflow/device/porch/state" in home.last, 30)
            assert sorted(home.configs()) == ENTITIES
            home.seen.clear()
            home.connection.publish("homeassistant/status", b"online")
            brokers.wait_until(lambda: sorted(home.configs()) == ENTITIES, 30)
            with Listener(broker) as late:
                brokers.wait_until(lambda: len(late.configs()) == 5 and "kinflow/device/porch/state" in late.last, 30)
            run.process.send_signal(signal.SIGTERM)
            assert run.wait() == 0, run.err
        brokers.wait_until(lambda: home.last["kinflow/device/porch/online"] == b"offline", 30)
        state = json.loads(home.last["kinflow/device/porch/state"])
        assert state["device"] == "porch"
        assert state["label"]
    (photos / f"new-{os.getpid()}.png").unlink()


def test_a_killed_device_is_offline_by_its_will(photos: Path, fashion: Path, broker: brokers.TestBroker) -> None:
    """Nobody says goodbye after kill -9; the broker does."""
    words = (f"watch:{photos}", "--bundle", str(fashion), "--local", "--name", "porch", "--output", "")
    with Listener(broker) as home, running("device", *words, "--mqtt", str(broker.address)) as run:
        brokers.wait_until(lambda: home.last.get("kinflow/device/porch/online") == b"online", 60)
        run.process.kill()
        brokers.wait_until(lambda: home.last["kinflow/device/porch/online"] == b"offline", 30)
        assert home.configs() == {}


def test_a_broker_that_is_away_is_no_reason_to_end(photos: Path, fashion: Path) -> None:
    """Answers still go to standard output; the missing broker is said once."""
    words = (f"folder:{photos}", "--bundle", str(fashion), "--rate", "0", "--local", "--mqtt", "127.0.0.1:9")
    with running("device", *words) as run:
        assert run.wait() == 0, run.err
        assert len(run.out) == 6
        assert sum("sink fails" in line for line in run.err) == 1


def test_frames_on_standard_input_never_queue(fashion: Path) -> None:
    """A writer that is faster than the rate is never held up; the answers are few and of the newest frames."""
    command = [sys.executable, "-m", "kinflow", "device", "-", "--bundle", str(fashion), "--local", "--rate", "5"]
    frame = sample_images(1)[0].tobytes()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        first: list[bytes] = []
        reader = threading.Thread(target=lambda: first.extend(process.stdout or ()))
        reader.start()
        process.stdin.write(frame)
        process.stdin.flush()
        brokers.wait_until(lambda: len(first) == 1, 60)
        for _ in range(300):
            process.stdin.write(frame)
            process.stdin.flush()
            time.sleep(0.003)
        process.stdin.close()
        reader.join(60)
        assert process.wait(60) == 0
    said = [json.loads(line) for line in first]
    assert 2 <= len(said) < 100
    assert len(said) + said[-1]["stale"] == 301


def test_sigterm_ends_a_device_that_waits_for_a_camera(fashion: Path, tmp_path: Path) -> None:
    """No frame has come yet; status 0 within moments, and no thread holds it up."""
    words = ("--log-level", "info", "device", f"watch:{tmp_path}", "--bundle", str(fashion), "--local")
    with running(*words) as run:
        run.line(" ready ")
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(30) == 0, run.err


def test_sigterm_ends_a_device_that_waits_for_standard_input(fashion: Path) -> None:
    """The thread that waits in a read does not take the interpreter down with it."""
    command = [
        sys.executable,
        "-m",
        "kinflow",
        "--log-level",
        "info",
        "device",
        "-",
        "--bundle",
        str(fashion),
        "--local",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert " ready " in process.stderr.readline()
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("webcam",), "the source is 'webcam'"),
        (("folder:/nowhere",), "/nowhere"),
        (("-", "--rate", "-1"), "service.rate_hz is -1"),
        (("-", "--name", "a/b"), "service.name is 'a/b'"),
        (("-", "--mqtt", "host:port"), "port is a number"),
    ],
)
def test_what_is_wrong_stops_the_start(words: tuple[str, ...], said: str, fashion: Path) -> None:
    """One line, status 2."""
    with running("device", *words, "--bundle", str(fashion), "--local") as run:
        assert run.wait() == 2
        assert any(said in line for line in run.err), run.err


def test_settings_name_everything(photos: Path, fashion: Path, tmp_path: Path) -> None:
    """As on a board: the unit passes nothing but the settings file."""
    tuned, file = tmp_path / "tuned.toml", tmp_path / "device.toml"
    with running("tune", str(fashion), "--seconds", "0.05", "--out", str(tuned)) as run:
        assert run.wait() == 0, run.err
        assert run.out[-1].startswith("chosen: ")
    file.write_text(
        f'tuned = "{tuned}"\noffload = false\n[service]\nbundle = "{fashion}"\nname = "shed"\n'
        f'source = "folder:{photos}"\nrate_hz = 0.0\n'
    )
    with running("device", "--settings", str(file), cwd=tmp_path) as run:
        assert run.wait() == 0, run.err
        assert {json.loads(line)["device"] for line in run.out} == {"shed"}


def test_entities_are_what_home_assistant_expects() -> None:
    """Unique ids, one device, templates on the state's own keys, and no option list of a thousand labels."""
    said = homeassistant.announcement("homeassistant", "porch", "Raspberry Pi 4", ["cat", "dog"])
    configs = {topic: json.loads(payload) for topic, payload in said}
    assert len({config["unique_id"] for config in configs.values()}) == 5
    assert {tuple(config["device"]["identifiers"]) for config in configs.values()} == {("kinflow_porch",)}
    answer = configs["homeassistant/sensor/kinflow_porch/answer/config"]
    assert answer["options"] == ["cat", "dog"]
    assert configs["homeassistant/binary_sensor/kinflow_porch/online/config"]["device_class"] == "connectivity"
    many = homeassistant.announcement("homeassistant", "porch", "Pi", [f"label {n}" for n in range(1000)])
    assert max(len(payload) for _, payload in many) < 2000


def test_a_password_file_that_is_not_there(tmp_path: Path) -> None:
    """The key and the file are named."""
    from kinflow.errors import SettingsError
    from kinflow.runtime.sinks import Mqtt

    settings = MqttSettings(broker="127.0.0.1", username="porch", password_file=str(tmp_path / "absent"))
    with pytest.raises(SettingsError, match=r"service\.mqtt\.password_file .*absent"):
        Mqtt(settings, "porch", "Pi", ["cat"])


def test_a_broker_that_asks_for_a_password_gets_it(tmp_path: Path) -> None:
    """mosquitto with a password file: the right one connects, none does not."""
    if "mosquitto" not in brokers.KINDS:
        pytest.skip("mosquitto is not installed")
    import shutil
    import socket

    from kinflow.address import BrokerAddress
    from kinflow_edge.broker import EXTRA_PATH

    path = f"{os.environ['PATH']}:{EXTRA_PATH}"
    tool, server = shutil.which("mosquitto_passwd", path=path), shutil.which("mosquitto", path=path)
    assert server is not None
    if tool is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run([tool, "-b", "-c", str(tmp_path / "passwords"), "porch", "s3cret"], check=True)
    (tmp_path / "passwords").chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path}/passwords\nuser root\n"
    )
    with subprocess.Popen([server, "-c", str(tmp_path / "conf")], stderr=subprocess.DEVNULL) as process:
        try:
            for login, wanted in ((("porch", "s3cret"), True), (None, False)):
                with Connection(
                    BrokerAddress("127.0.0.1", port), f"c-{wanted}", on_message=lambda *_: None, login=login
                ) as connection:
                    assert connection.wait_connected(10 if wanted else 1.5) is wanted
        finally:
            process.terminate()
