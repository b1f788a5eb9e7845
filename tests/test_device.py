"""The device with real servers on loopback: who answers, what it costs, threads, deadlines, bad input."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from brokers import KINDS, wait_until
from device_site import IMAGES, LATE_MS, assert_local, local_answer
from kinflow.answer import Answer
from kinflow.device import Device
from kinflow.errors import InputError, SettingsError
from kinflow.family import Family
from kinflow.fleet import Fleet, ServerProcess
from kinflow.preprocess import Preprocessor
from kinflow.settings import DeviceSettings
from system_fixtures import LOOPBACK, copy_bundle, member_answer


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def edge(always_edge: Path) -> Iterator[ServerProcess]:
    """One edge server for the tests that do it no harm."""
    with Fleet([always_edge]) as fleet:
        yield fleet.start("edge")


@pytest.fixture
def device(always_edge: Path, edge: ServerProcess) -> Iterator[Device]:
    with Device.open(always_edge, DeviceSettings(broker=edge.broker, deadline_s=5.0)) as device:
        assert device.wait_for_server(15)
        yield device


def test_a_sure_device_answers_itself_and_sends_nothing(always_edge: Path, edge: ServerProcess) -> None:
    """At threshold 0 nothing leaves the device, though a server is there: kept because it is confident."""
    settings = DeviceSettings(broker=edge.broker, threshold=0.0)
    with Device.open(always_edge, settings) as device:
        assert device.wait_for_server(15)
        for number in range(5):
            answer = device.infer(IMAGES[number])
            assert (answer.index, answer.confidence) == pytest.approx(local_answer(always_edge, number), abs=1e-5)
            assert (answer.tier, answer.degraded, answer.reason) == ("device", False, "confident")
            assert (answer.bytes_up, answer.bytes_down, answer.timings.hops) == (0, 0, ())


@pytest.mark.parametrize("codec", ["s1-q4", "s1-q8"])
def test_the_edges_answer_is_the_edge_members(always_edge: Path, edge: ServerProcess, codec: str) -> None:
    """The edge member, fed with the features coded and decoded here, says the same as the server: nothing is lost."""
    with Device.open(always_edge, DeviceSettings(broker=edge.broker, deadline_s=5.0, codec=codec)) as device:
        assert device.wait_for_server(15)
        for number in range(8):
            answer = device.infer(IMAGES[number])
            label, confidence = member_answer(device.family, "edge", IMAGES[number], {"s1": codec})
            assert (answer.tier, answer.exit, answer.index) == ("edge", "edge", label)
            assert answer.label == device.family.labels[label]
            assert answer.confidence == pytest.approx(confidence, abs=1e-5)
            assert not answer.degraded


def test_an_offloaded_answer_tells_what_it_cost(device: Device, edge: ServerProcess) -> None:
    """Bytes both ways, times that add up, and the server's hop."""
    payload = device.family.codec("s1").encode(_features(device.family, IMAGES[0])[0])
    answer = device.infer(IMAGES[0])
    assert answer.bytes_up > len(payload)
    assert answer.bytes_up < len(payload) + 300
    assert answer.bytes_down > 0
    (hop,) = answer.timings.hops
    assert (hop.node, hop.tier) == (edge.ready["node"], "edge")
    spent_ms = answer.timings.compute_ms + answer.timings.encode_ms + answer.timings.link_ms
    assert spent_ms == pytest.approx(answer.total_ms, abs=0.5)
    assert hop.total_ms <= answer.timings.link_ms
    assert len(bytes.fromhex(answer.request_id)) == 16


def _features(family: Family, image: np.ndarray) -> np.ndarray:
    features = family.member("device").run(Preprocessor(family.preprocess)(image)).features
    assert features is not None
    return features


def test_an_unsure_edge_brings_the_clouds_answer(always_cloud: Path) -> None:
    """Through both servers: the cloud member's answer, features coded twice on the way."""
    with Fleet([always_cloud]) as fleet:
        _, edge = fleet.start_cloud_and_edge()
        with Device.open(always_cloud, DeviceSettings(broker=edge.broker, deadline_s=5.0)) as device:
            assert device.wait_for_server(15)
            wait_until(lambda: device.infer(IMAGES[0]).tier == "cloud")
            for number in range(8):
                answer = device.infer(IMAGES[number])
                label, confidence = member_answer(device.family, "cloud", IMAGES[number])
                assert (answer.tier, answer.exit, answer.index) == ("cloud", "cloud", label)
                assert answer.confidence == pytest.approx(confidence, abs=1e-5)
                assert not answer.degraded
                assert [hop.tier for hop in answer.timings.hops] == ["edge", "cloud"]
                assert answer.timings.hops[0].bytes_up > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_may_ask_the_cloud_directly(kind: str, always_cloud: Path) -> None:
    """Without an edge server the cloud member continues from the device's own split."""
    with Fleet([always_cloud]) as fleet:
        cloud = fleet.start("cloud", "--broker-kind", kind)
        with Device.open(always_cloud, DeviceSettings(broker=cloud.broker, deadline_s=5.0)) as device:
            assert device.wait_for_server(15)
            answer = device.infer(IMAGES[1])
            assert (answer.tier, answer.degraded) == ("cloud", False)
            assert [hop.node for hop in answer.timings.hops] == [cloud.ready["node"]]


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_both_runtimes_offload_alike(always_edge: Path, edge: ServerProcess, backend: str) -> None:
    """One setting changes the device's runtime; the server's answers stay the same."""
    if backend == "tflite":
        pytest.importorskip("ai_edge_litert", reason="no TFLite runtime: pip install 'kinflow[tflite]'")
    settings = DeviceSettings(broker=edge.broker, deadline_s=5.0, backend=backend)
    with Device.open(always_edge, settings) as device:
        assert device.wait_for_server(15)
        for number in range(6):
            answer = device.infer(IMAGES[number])
            label, confidence = member_answer(device.family, "edge", IMAGES[number])
            assert (answer.tier, answer.index) == ("edge", label)
            # A feature at the border of two levels may be rounded to either.
            assert answer.confidence == pytest.approx(confidence, abs=0.1)


# Threads and futures


def test_futures_carry_the_same_answers(device: Device) -> None:
    """`submit` is `infer` on a thread of the device's own; asyncio can wait for it."""
    expected = [device.infer(image).index for image in IMAGES]
    futures = [device.submit(image) for image in IMAGES]
    assert [future.result(10).index for future in futures] == expected

    async def wait() -> Answer:
        return await asyncio.wrap_future(device.submit(IMAGES[5], deadline_s=5.0))

    assert asyncio.run(wait()).index == expected[5]
    with pytest.raises(InputError):
        device.submit(np.zeros((3, 3), np.uint8)).result(10)


def test_eight_threads_share_a_device(device: Device) -> None:
    """Each gets the answer to its own image, from the edge, whatever the others do."""
    expected = [member_answer(device.family, "edge", image)[0] for image in IMAGES]
    answers: list[dict[int, list[Answer]]] = [{} for _ in range(8)]

    def work(mine: dict[int, list[Answer]], first: int) -> None:
        for step in range(3 * len(IMAGES)):
            number = (first + step) % len(IMAGES)
            mine.setdefault(number, []).append(device.infer(IMAGES[number]))

    threads = [threading.Thread(target=work, args=(mine, 5 * place)) for place, mine in enumerate(answers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [(number, answer) for mine in answers for number, some in mine.items() for answer in some]
    assert len(everything) == 8 * 3 * len(IMAGES)
    assert [number for number, answer in everything if answer.index != expected[number]] == []
    assert {answer.tier for _, answer in everything} == {"edge"}
    assert len({answer.request_id for _, answer in everything}) == len(everything)


def test_leaving_ends_what_was_submitted(always_edge: Path, edge: ServerProcess) -> None:
    """The block waits for running inferences, drops those that wait, and leaves no thread."""
    before = set(threading.enumerate())
    with Device.open(always_edge, DeviceSettings(broker=edge.broker, workers=2)) as device:
        assert device.wait_for_server(15)
        futures = [device.submit(image) for image in IMAGES]
    assert all(future.done() for future in futures)
    assert all(future.cancelled() or future.result().label for future in futures)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_after_the_block_it_answers_locally(always_edge: Path, edge: ServerProcess) -> None:
    """A late caller gets the device's own answer and not a hang."""
    with Device.open(always_edge, DeviceSettings(broker=edge.broker)) as device:
        assert device.wait_for_server(15)
    assert_local(device.infer(IMAGES[0]), always_edge, 0, 1.0)
    with pytest.raises(SettingsError):
        device.submit(IMAGES[0])


# Deadlines and input


@pytest.mark.parametrize("deadline_s", [0.0001, 0.003])
def test_a_deadline_too_short_for_the_network_is_kept(device: Device, always_edge: Path, deadline_s: float) -> None:
    """The policy sees that nothing can come back in time: the local answer, without waiting."""
    device.infer(IMAGES[0])
    answer = device.infer(IMAGES[0], deadline_s=deadline_s)
    if answer.tier == "device":
        assert_local(answer, always_edge, 0, deadline_s)
    else:
        assert answer.total_ms <= deadline_s * 1e3 + LATE_MS
    assert deadline_s > 0.001 or answer.tier == "device"


@pytest.mark.parametrize("deadline_s", [0, -1, 3601, float("nan"), float("inf")])
def test_a_senseless_deadline_is_an_error(device: Device, deadline_s: float) -> None:
    """Named with the value; nothing is computed for it."""
    with pytest.raises(SettingsError, match="deadline_s must be above 0"):
        device.infer(IMAGES[0], deadline_s=deadline_s)


BAD = {
    "shape": np.zeros((27, 28), np.uint8),
    "colour": np.zeros((28, 28, 3), np.uint8),
    "empty": np.zeros((0, 0), np.uint8),
    "dtype": np.zeros((28, 28), np.int32),
    "nan": np.full((28, 28), np.nan, np.float32),
    "range": np.full((28, 28), 255, np.float32),
    "list": [[0] * 28] * 28,
    "none": None,
    "path": "image.png",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_the_callers_error(device: Device, kind: str) -> None:
    """Named at once and here: the server never sees them, and the next image is answered."""
    with pytest.raises(InputError):
        device.infer(BAD[kind])
    assert device.infer(IMAGES[0]).tier == "edge"


# Discovery


@pytest.fixture
def announced(tmp_path: Path) -> Path:
    """As `always_edge`, under an id that only this test's servers announce."""
    return copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 0.0})


def test_the_edge_server_is_found_and_preferred(announced: Path) -> None:
    """No broker is named: zeroconf finds both servers on loopback, and the nearer tier is asked."""
    with Fleet([announced]) as fleet:
        cloud = fleet.start("cloud")
        settings = DeviceSettings(interfaces=[LOOPBACK], deadline_s=5.0)
        with Device.open(announced, settings) as device:
            assert device.wait_for_server(15)
            assert device.infer(IMAGES[0]).timings.hops[0].node == cloud.ready["node"]
            edge = fleet.start("edge", "--upstream", cloud.broker)
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")
        with Device.open(announced, settings) as device:
            assert device.wait_for_server(15)
            # Either may be heard of first; from then on it is the edge.
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")
            asked = [device.infer(image).timings.hops[0].node for image in IMAGES]
            # One that a busy machine keeps waiting may be helped out by the other.
            assert asked.count(edge.ready["node"]) >= 0.9 * len(asked)


def test_the_cloud_takes_over_when_the_edge_is_killed(announced: Path) -> None:
    """The found edge server dies: the other announced server is asked at once, and hardly an answer is local."""
    with Fleet([announced]) as fleet:
        _, edge = fleet.start_cloud_and_edge()
        with Device.open(announced, DeviceSettings(interfaces=[LOOPBACK])) as device:
            assert device.wait_for_server(15)
            wait_until(lambda: device.infer(IMAGES[0]).tier == "edge")
            os.kill(edge.pid, signal.SIGKILL)
            tiers = []
            wait_until(lambda: tiers.append(device.infer(IMAGES[0]).tier) or tiers[-1] == "cloud", 20)
            assert tiers.count("device") < 5
