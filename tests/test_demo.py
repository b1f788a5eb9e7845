"""The demo as users start it: one command, every process gone afterwards, also when things are killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from brokers import wait_until
from kinflow import topics
from kinflow.family import Family
from kinflow.mqtt import BrokerAddress, Connection
from system_fixtures import FASHION, Running, copy_bundle, running, tagged

KEYS = {
    "images",
    "accuracy",
    "accuracy_device_only",
    "accuracy_cloud_only",
    "tiers",
    "bytes_per_inference",
    "png_bytes",
    "jpeg_bytes",
    "raw_bytes",
    "degraded",
}
TIER_KEYS = {"share", "accuracy", "p50_ms", "p95_ms", "bytes_up_mean"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed family's folder under an id of its own: another demo on this machine is not found.

    Its device is harder to please, so that there is always something under way when a server is killed.
    """
    folder = tmp_path_factory.mktemp("family")
    copy_bundle(folder / "bundle", thresholds={"device": 0.999, "edge": 0.95})
    shutil.copytree(FASHION / "samples", folder / "samples")
    return folder


@contextmanager
def demo(own: Path, *options: str) -> Iterator[Running]:
    with running("demo", "--family", str(own), *options) as run:
        yield run


def started(run: Running, name: str) -> tuple[int, int, str]:
    """(the server's pid, its broker's pid, the broker's host:port) as the demo says them."""
    said = run.line(rf"{name} server: pid (\d+), \w+ broker \(pid (\d+)\) at (\S+)")
    return int(said[1]), int(said[2]), said[3]


@contextmanager
def in_the_middle(run: Running, own: Path, requests: int = 20) -> Iterator[None]:
    """From when the device has sent its first requests to the edge server; a bystander at its broker counts them."""
    seen: list[str] = []
    address = BrokerAddress.parse(started(run, "edge")[2])
    topic = topics.request_to("+", Family.load(own / "bundle").id, "s1", "+")
    with Connection(
        address, f"bystander-{os.urandom(4).hex()}", on_message=lambda t, _: seen.append(t), subscriptions=[topic]
    ) as connection:
        assert connection.wait_connected(10)
        wait_until(lambda: len(seen) >= requests or run.process.poll() is not None, 30)
        assert run.process.poll() is None, run.err[-5:]
        yield


def test_the_summary_is_one_json_object(own: Path) -> None:
    """Exactly what is documented, with sums that agree; exit status 0 and not one process left."""
    with demo(own, "--images", "300", "--json") as run:
        assert run.wait(120) == 0, run.err[-5:]
        assert run.gone()
        (line,) = run.out
    summary = json.loads(line)
    assert set(summary) >= KEYS
    assert set(summary) - KEYS <= {"reasons"}
    assert set(summary["tiers"]) == {"device", "edge", "cloud"}
    assert all(set(tier) == TIER_KEYS for tier in summary["tiers"].values())
    assert summary["images"] == 300
    assert summary["raw_bytes"] == 28 * 28
    assert summary["degraded"] == sum(summary["reasons"].values())
    # The policy gives every tier something to do.
    assert all(tier["share"] > 0 for tier in summary["tiers"].values())
    assert sum(tier["share"] for tier in summary["tiers"].values()) == pytest.approx(1)
    of_all = sum(tier["share"] * tier["accuracy"] for tier in summary["tiers"].values())
    assert summary["accuracy"] == pytest.approx(of_all)
    sent = sum(tier["share"] * tier["bytes_up_mean"] for tier in summary["tiers"].values())
    assert summary["bytes_per_inference"] == pytest.approx(sent)
    assert summary["tiers"]["device"]["bytes_up_mean"] < summary["tiers"]["edge"]["bytes_up_mean"]
    for name in ("accuracy", "accuracy_device_only", "accuracy_cloud_only"):
        assert 50 < summary[name] <= 100


def test_people_get_tables(own: Path) -> None:
    """Without --json: which servers run, the last rows of the live table, and the summary's tables."""
    with demo(own, "--images", "30") as run:
        assert run.wait(120) == 0, run.err[-5:]
        text = "\n".join(run.out)
    for expected in ("edge server: pid", "cloud server: pid", "bytes up per inference", "accuracy", "as JPEG"):
        assert expected in text


def test_photos_come_after_the_counted_images() -> None:
    """In the checkout a second family names photos, on the same servers, and the summary counts the first alone."""
    with running("demo", "--images", "20", cwd=FASHION.parents[1]) as run:
        assert run.wait(120) == 0, run.err[-5:]
        assert run.gone()
        text = "\n".join(run.out)
    summary, photos = text.split("another family")
    assert "20 images" in summary
    assert "espresso" in photos
    assert "tripod" in photos


def test_ctrl_c_ends_every_process(own: Path) -> None:
    """In the middle of the work: servers and brokers go with the demo, whose status says it was interrupted."""
    with demo(own, "--json") as run:
        with in_the_middle(run, own):
            assert len(tagged(run.tag)) == 5
            run.process.send_signal(signal.SIGINT)
        assert run.wait(30) == 130
        assert run.gone()


def test_ctrl_c_while_it_starts_ends_every_process(own: Path) -> None:
    """The cloud server is up, the edge server not yet."""
    with demo(own, "--json") as run:
        wait_until(lambda: len(tagged(run.tag)) >= 2, 30)
        time.sleep(0.3)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(30) != 0
        assert run.gone()
        assert "Traceback" not in "\n".join(run.err)


def test_nothing_outlives_a_demo_that_is_killed(own: Path) -> None:
    """kill -9 gives it no chance to stop anything."""
    with demo(own, "--json") as run:
        with in_the_middle(run, own):
            run.process.kill()
        assert run.gone(20)


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_a_killed_server_is_told_and_missed(own: Path, name: str) -> None:
    """It says which one died, and every image is answered all the same: by the cloud, asked directly, or locally."""
    with demo(own, "--images", "500", "--json") as run:
        pid, _, _ = started(run, name)
        with in_the_middle(run, own):
            os.kill(pid, signal.SIGKILL)
        assert run.wait(120) == 0, run.err[-5:]
        told = "\n".join(run.err)
        assert f"the {name} server (pid {pid}) died, status -9; the device goes on answering" in told
        summary = json.loads(run.out[0])
        assert summary["images"] == 500
        if name == "edge":
            assert summary["tiers"]["cloud"]["share"] > 0
        else:
            assert summary["degraded"] > 0
        assert run.gone()


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_a_killed_broker_is_told_and_replaced(own: Path, name: str) -> None:
    """As above with the broker: its server starts another one, and nothing is left of either."""
    with demo(own, "--json") as run:
        _, broker_pid, _ = started(run, name)
        with in_the_middle(run, own):
            os.kill(broker_pid, signal.SIGKILL)
        assert run.wait(120) == 0, run.err[-5:]
        assert f"the {name} server's broker died and was restarted (pid " in "\n".join(run.err)
        summary = json.loads(run.out[0])
        assert summary["images"] == 1000
        assert run.gone()


def test_a_folder_without_samples_or_bundle_is_named(tmp_path: Path) -> None:
    """One line, status 2, no process."""
    with demo(tmp_path, "--json") as run:
        assert run.wait(60) == 2
        assert len([line for line in run.err if line.startswith("error: ")]) == 1
        assert str(tmp_path) in "\n".join(run.err)
        assert run.gone()
