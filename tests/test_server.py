"""A server with its real broker, asked by a real link: status, escalation, shared work, and what it survives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asker import IMAGES, Asker
from brokers import KINDS, wait_until
from kinflow.errors import BundleError, FamilyMismatch, LinkError, ServerFailed, SettingsError
from kinflow.family import Family
from kinflow.fleet import Fleet, ServerProcess
from kinflow.link import Link
from kinflow.mqtt import BrokerAddress
from kinflow.settings import BrokerSettings, ServerSettings
from kinflow.stopping import Stop
from kinflow_edge.server import Server
from system_fixtures import alive, copy_bundle, member_answer, silent_broker


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def unsure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose edge exit is never sure enough."""
    return copy_bundle(tmp_path_factory.mktemp("unsure") / "bundle", thresholds={"edge": 1.0})


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose edge exit is always sure enough."""
    return copy_bundle(tmp_path_factory.mktemp("sure") / "bundle", thresholds={"edge": 0.0})


@pytest.fixture
def fleet(unsure: Path) -> Iterator[Fleet]:
    with Fleet([unsure]) as fleet:
        yield fleet


@pytest.fixture
def pair(fleet: Fleet) -> tuple[ServerProcess, ServerProcess]:
    return fleet.start_cloud_and_edge()


def settings(bundle: Path, **changes: Any) -> ServerSettings:
    fields = {
        "bundles": [str(bundle)],
        "broker": BrokerSettings(kind=KINDS[0], port=0),
        "advertise": False,
        "status_interval_s": 0.2,
        "node": f"n-{os.urandom(4).hex()}",
    }
    return ServerSettings(**{**fields, **changes})


# Status


@pytest.mark.parametrize("kind", KINDS)
def test_the_retained_status_tells_all_and_follows_the_work(kind: str, sure: Path) -> None:
    """Who comes later sees it too; it counts answers and refusals, and says offline at the end."""
    chosen = settings(sure, broker=BrokerSettings(kind=kind, port=0))
    stop = Stop()
    with Server("edge", chosen) as server:
        loop = threading.Thread(target=server.run, args=(stop, lambda: None))
        loop.start()
        try:
            with Asker(sure, str(server.broker.address)) as asker:
                node = server.node
                served = asker.status(node).families[0]
                assert (served.family, served.version) == (asker.family.id, asker.family.version)
                assert served.splits == {"s1": list(asker.family.manifest.splits["s1"].codecs)}
                for number in range(5):
                    asker.ask(number)
                with pytest.raises(ServerFailed, match="mismatch"):
                    asker.send(version="0.0.1").result(10)
                wait_until(lambda: asker.status(node).served == 5)
                wait_until(lambda: asker.status(node).rejected == 1)
                assert asker.status(node).queue_ms > 0
                assert 0 <= asker.status(node).load <= 1
                server._say_offline()
                wait_until(lambda: asker.status(node).state == "offline")
        finally:
            stop.set()
            loop.join()


def test_stopping_says_offline_and_killing_leaves_the_will(fleet: Fleet) -> None:
    """Devices must not send to a server that is gone, however it went. Both share the broker that stays."""
    hub = fleet.start("cloud")
    gentle = fleet.start("edge", "--broker", hub.broker, name="gentle")
    brutal = fleet.start("edge", "--broker", hub.broker, name="brutal")
    with Link(BrokerAddress.parse(hub.broker), "watcher") as link:
        nodes = [gentle.ready["node"], brutal.ready["node"]]
        wait_until(lambda: all(node in link.nodes and link.nodes[node].state == "ready" for node in nodes))
        gentle.process.terminate()
        brutal.process.kill()
        wait_until(lambda: all(link.nodes[node].state == "offline" for node in nodes))
        assert gentle.process.wait(10) == 0


# Answers


def test_an_edge_server_that_is_sure_answers_itself(sure: Path) -> None:
    """The edge member's own answer on the coded features, though a cloud server stands above."""
    with Fleet([sure]) as fleet:
        _, edge = fleet.start_cloud_and_edge()
        with Asker(sure, edge.broker) as asker:
            for number in range(8):
                reply = asker.ask(number)
                label, confidence = member_answer(asker.family, "edge", IMAGES[number])
                assert (reply.tier, reply.exit, reply.label) == ("edge", "edge", label)
                assert reply.confidence == pytest.approx(confidence, abs=1e-5)
                assert not reply.degraded


def test_an_edge_server_that_is_unsure_escalates(pair: tuple[ServerProcess, ServerProcess], unsure: Path) -> None:
    """The cloud member's answer, features coded at both splits, with a hop for each server, nearest first."""
    cloud, edge = pair
    with Asker(unsure, edge.broker) as asker:
        wait_until(lambda: asker.ask().tier == "cloud")  # until the edge server knows its upstream
        for number in range(8):
            reply = asker.ask(number)
            label, confidence = member_answer(asker.family, "cloud", IMAGES[number])
            assert (reply.tier, reply.exit, reply.label) == ("cloud", "cloud", label)
            assert reply.confidence == pytest.approx(confidence, abs=1e-5)
            assert not reply.degraded
            assert [hop.node for hop in reply.hops] == [edge.ready["node"], cloud.ready["node"]]
            assert [hop.tier for hop in reply.hops] == ["edge", "cloud"]
            assert reply.hops[0].bytes_up > 0
            assert reply.hops[1].bytes_up == 0
            assert reply.hops[0].total_ms >= reply.hops[1].total_ms


def test_many_escalations_at_once_keep_their_answers_apart(
    pair: tuple[ServerProcess, ServerProcess], unsure: Path
) -> None:
    """Batches on two servers and replies in any order: each request gets its own image's answer."""
    with Asker(unsure, pair[1].broker) as asker:
        wait_until(lambda: asker.ask().tier == "cloud")
        expected = [member_answer(asker.family, "cloud", image)[0] for image in IMAGES]
        futures = [(number, asker.send(number)) for _ in range(4) for number in range(len(IMAGES))]
        replies = [(number, future.result(20).reply) for number, future in futures]
        assert [reply.label for _, reply in replies] == [expected[number] for number, _ in replies]
        assert {reply.tier for _, reply in replies} == {"cloud"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_edge_server_answers_without_its_cloud(
    pair: tuple[ServerProcess, ServerProcess], unsure: Path, how: signal.Signals
) -> None:
    """Its own answer in time, degraded, with a reason; never silence. The same after the cloud's clean stop."""
    cloud, edge = pair
    with Asker(unsure, edge.broker) as asker:
        wait_until(lambda: asker.ask().tier == "cloud")
        os.kill(cloud.pid, how)
        cloud.process.wait(10)
        replies = []
        give_up_s = time.monotonic() + 1.0
        while time.monotonic() < give_up_s:
            start = time.monotonic()
            reply = asker.ask(len(replies) % len(IMAGES), deadline_s=2.0)
            assert time.monotonic() - start < 3.0
            replies.append(reply)
        last = replies[-1]
        assert (last.tier, last.degraded) == ("edge", True)
        assert last.reason
        label, _ = member_answer(asker.family, "edge", IMAGES[(len(replies) - 1) % len(IMAGES)])
        assert last.label == label
        assert last.hops[0].bytes_up == 0 or len(last.hops) == 1


def test_a_silent_upstream_costs_no_time(unsure: Path) -> None:
    """Something that accepts connections and never answers is no upstream: answers come at once, degraded."""
    with silent_broker() as upstream, Fleet([unsure]) as fleet:
        edge = fleet.start("edge", "--upstream", upstream)
        with Asker(unsure, edge.broker) as asker:
            for number in range(3):
                start = time.monotonic()
                reply = asker.ask(number)
                assert time.monotonic() - start < 5.0
                assert (reply.tier, reply.degraded) == ("edge", True)
                assert upstream in reply.reason or "no server" in reply.reason


def test_an_upstream_of_another_version_is_not_asked(unsure: Path, tmp_path: Path) -> None:
    """The cloud server was updated, the edge server was not: degraded, and the reason names both versions."""
    newer = copy_bundle(tmp_path / "newer", family=Family.load(unsure).id, version="9.9.9")
    with Fleet([newer]) as above, Fleet([unsure]) as fleet:
        edge = fleet.start("edge", "--upstream", above.start("cloud").broker)
        with Asker(unsure, edge.broker) as asker:
            wait_until(lambda: "9.9.9" in asker.ask().reason)
            reply = asker.ask()
            assert (reply.tier, reply.degraded) == ("edge", True)
            assert Family.load(unsure).version in reply.reason


def test_two_servers_of_a_tier_share_the_work(sure: Path) -> None:
    """Scale-out is a second server on the same broker: each request goes to exactly one of them."""
    with Fleet([sure]) as fleet:
        first = fleet.start("edge")
        second = fleet.start("edge", "--broker", first.broker, name="second")
        with Asker(sure, first.broker) as asker:
            nodes = {first.ready["node"], second.ready["node"]}
            wait_until(lambda: nodes <= set(asker.link.nodes))
            futures = [asker.send(number % len(IMAGES)) for number in range(60)]
            worked = [future.result(20).reply.hops[0].node for future in futures]
            assert set(worked) == nodes
            wait_until(lambda: sum(asker.status(node).served for node in nodes) == 60)


def test_a_cloud_server_at_the_edges_broker_takes_only_its_own_tier(sure: Path) -> None:
    """Edge and cloud may share one broker: a request for the edge tier is answered there, and once."""
    with Fleet([sure]) as fleet:
        edge = fleet.start("edge")
        fleet.start("cloud", "--broker", edge.broker)
        with Asker(sure, edge.broker) as asker:
            assert {asker.ask(number % len(IMAGES)).tier for number in range(20)} == {"edge"}
            assert asker.link.counters.unexpected == 0


# Brokers and bad settings


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_outlives_its_broker(kind: str, sure: Path) -> None:
    """The broker is killed under it: restarted, told, subscribed again, status renewed; then requests work."""
    restarted = threading.Event()
    stop = Stop()
    with Server("edge", settings(sure, broker=BrokerSettings(kind=kind, port=0))) as server:
        loop = threading.Thread(target=server.run, args=(stop, restarted.set))
        # The kernel ends a broker with the thread that started it: as in the command, that is the main one.
        pid = server.broker.pid
        assert pid is not None
        loop.start()
        try:
            with Asker(sure, str(server.broker.address)) as asker:
                asker.ask()
                os.kill(pid, signal.SIGKILL)
                assert restarted.wait(15)
                assert server.broker.pid not in (None, pid)
                wait_until(lambda: asker.link.connected)
                wait_until(lambda: _answers(asker))
        finally:
            stop.set()
            loop.join()


def _answers(asker: Asker) -> bool:
    try:
        return asker.ask(deadline_s=1.0).tier == "edge"
    except LinkError:
        return False


def test_a_bundle_that_cannot_be_served_is_refused_before_anything_starts(
    sure: Path, bundle: Path, tmp_path: Path
) -> None:
    """No bundle, two of one family, a missing one, a member that begins at the input, nothing above the last."""
    twin = copy_bundle(tmp_path / "twin", family=Family.load(sure).id)
    with pytest.raises(SettingsError, match="no bundle to serve"):
        Server("edge", settings(sure, bundles=[]))
    with pytest.raises(SettingsError, match="second bundle of the family"):
        Server("edge", settings(sure, bundles=[str(sure), str(twin)]))
    with pytest.raises(BundleError, match="does not exist"):
        Server("edge", settings(sure, bundles=[str(tmp_path / "none")]))
    with pytest.raises(FamilyMismatch, match=r"'device'.*begins at the input"):
        Server("edge", settings(sure, member="device"))
    with pytest.raises(FamilyMismatch, match="not 'huge'"):
        Server("edge", settings(sure, member="huge"))
    with pytest.raises(SettingsError, match=r"nothing of .* is above"):
        Server("cloud", settings(sure, upstream="127.0.0.1:9")).__enter__()
    two = Server("edge", settings(sure, bundles=[str(sure), str(bundle)]))
    assert len(two._models) == 2


def test_a_server_that_fails_to_start_leaves_no_broker(sure: Path) -> None:
    """The upstream is refused after the broker was started: it is stopped again."""
    server = Server("cloud", settings(sure, upstream="127.0.0.1:9"))
    pids: list[int] = []
    enter = server.broker.__class__.__enter__

    def noticing(broker: Any) -> Any:
        started = enter(broker)
        pids.append(broker.pid)
        return started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.broker.__class__, "__enter__", noticing)
        with pytest.raises(SettingsError):
            server.__enter__()
    assert len(pids) == 1
    assert not any(alive(pid) for pid in pids)


def test_two_families_at_one_server_do_not_mix(sure: Path, unsure: Path) -> None:
    """Each request is computed by its own family's member."""
    with Fleet([sure, unsure]) as fleet:
        edge = fleet.start("edge")
        for bundle in (sure, unsure):
            with Asker(bundle, edge.broker) as asker:
                label, _ = member_answer(asker.family, "edge", IMAGES[3])
                assert asker.ask(3).label == label
