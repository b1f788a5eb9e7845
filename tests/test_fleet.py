"""Servers as child processes: how they start, what is told of them, and that all of it ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import KINDS, wait_until
from kinflow.errors import LinkError
from kinflow.fleet import Fleet, ServerProcess
from system_fixtures import LOOPBACK, TAG, alive, copy_bundle, tagged

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed leaves its broker's folder: not in the machine's /tmp."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of three members that nobody else announces."""
    return copy_bundle(tmp_path_factory.mktemp("fleet") / "bundle")


@pytest.fixture
def tag(monkeypatch: pytest.MonkeyPatch) -> str:
    """What every process started in this test carries in its environment."""
    tag = os.urandom(8).hex()
    monkeypatch.setenv(TAG, tag)
    return tag


@pytest.fixture
def fleet(trio: Path) -> Iterator[Fleet]:
    with Fleet([trio]) as fleet:
        yield fleet


def broker_pid(server: ServerProcess) -> int:
    return int(server.ready["broker_pid"])


@each_kind
def test_the_usual_pair_starts_and_ends_without_a_trace(kind: str, trio: Path, tag: str) -> None:
    """Two servers and two brokers on loopback, the edge server's upstream being the cloud's broker; then none."""
    with Fleet([trio]) as fleet:
        cloud, edge = fleet.start_cloud_and_edge("--broker-kind", kind)
        assert (cloud.ready["tier"], edge.ready["tier"]) == ("cloud", "edge")
        assert edge.ready["upstream"] == cloud.broker
        for server in (cloud, edge):
            assert server.broker.startswith(f"{LOOPBACK}:")
            assert server.ready["broker_kind"] == kind
            assert server.alive
            assert alive(broker_pid(server))
        assert len(set(tagged(tag))) == 4
        assert fleet.news() == []
    assert tagged(tag) == []
    assert not cloud.alive
    assert (cloud.process.returncode, edge.process.returncode) == (0, 0)


@each_kind
def test_a_server_that_is_killed_is_news_once(kind: str, fleet: Fleet, tag: str) -> None:
    """The line names the server, its pid and how it died; its broker dies with it."""
    server = fleet.start("cloud", "--broker-kind", kind)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive)
    assert fleet.news() == [f"the cloud server (pid {server.pid}) died, status -9"]
    assert fleet.news() == []
    wait_until(lambda: not tagged(tag))


@each_kind
def test_a_broker_that_is_killed_is_replaced_and_news(kind: str, fleet: Fleet) -> None:
    """The server stays, its broker comes back at the same address, and the line names the new pid."""
    server = fleet.start("edge", "--broker-kind", kind)
    os.kill(broker_pid(server), signal.SIGKILL)
    news: list[str] = []
    wait_until(lambda: bool(news) or bool(news.extend(fleet.news())))
    (line,) = news
    assert line.startswith("the edge server's broker died and was restarted (pid ")
    assert alive(int(line.rpartition("pid ")[2].rstrip(")")))
    host, _, port = server.broker.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    assert server.alive


def test_a_server_that_cannot_start_says_why(tmp_path: Path, tag: str) -> None:
    """The error carries the server's own sentence, and nothing of it stays."""
    with Fleet([tmp_path / "missing"]) as fleet, pytest.raises(LinkError, match=r"kinflow cloud.*status 2.*missing"):
        fleet.start("cloud")
    assert tagged(tag) == []


def test_a_taken_port_says_so(fleet: Fleet) -> None:
    """As above, for the most usual reason."""
    with socket.create_server((LOOPBACK, 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(LinkError, match=f"port {port} of {LOOPBACK} is in use"):
            fleet.start("cloud", "--port", port)


def test_servers_may_share_a_broker(fleet: Fleet) -> None:
    """`--broker` starts a server without one of its own; names keep two of a tier apart."""
    first = fleet.start("edge")
    second = fleet.start("edge", "--broker", first.broker, name="edge-2")
    assert second.ready["broker"] == first.broker
    assert second.ready["broker_kind"] == "external"
    assert second.ready["broker_pid"] is None
    assert set(fleet.servers) == {"edge", "edge-2"}
