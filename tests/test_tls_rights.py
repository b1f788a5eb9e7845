"""Behind mutual TLS, at a real mosquitto: what each may read and write."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from authority import TestAuthority
from brokers import KINDS, wait_until
from kinflow import topics
from kinflow.settings import BrokerSettings
from kinflow_edge.broker import Broker
from tls_site import CAM, EDGE, MARK, OTHER, REQUEST, REQUESTS, Client

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")
pytestmark = pytest.mark.skipif("mosquitto" not in KINDS, reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def broker(pki: TestAuthority) -> Iterator[Broker]:
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as broker:
        yield broker


def test_a_device_asks_under_its_own_name_only(pki: TestAuthority, broker: Broker) -> None:
    """What a device publishes on another's request topic reaches no server."""
    with (
        Client(broker, pki.credentials(EDGE), REQUESTS, topics.request_to(EDGE, "fam", "s1", "+")) as server,
        Client(broker, pki.credentials(OTHER)) as other,
    ):
        server.connected()
        other.connected()
        other.connection.publish(REQUEST, b"in another's name")
        other.connection.publish(topics.request_to(EDGE, "fam", "s1", CAM), b"and to this node")
        other.connection.publish(topics.request("edge", "fam", "s1", OTHER), MARK)
        assert server.payloads() == []


def test_a_device_reads_its_own_replies_only(pki: TestAuthority, broker: Broker) -> None:
    """Subscribed to everything, a device gets statuses and what was sent to itself."""
    with (
        Client(broker, pki.credentials(EDGE)) as server,
        Client(broker, pki.credentials(CAM), topics.reply(CAM)) as device,
        Client(broker, pki.credentials(OTHER), "#") as curious,
    ):
        for client in (server, device, curious):
            client.connected()
        device.connection.publish(REQUEST, b"features")
        server.connection.publish(topics.reply(CAM), b"an answer")
        server.connection.publish(topics.reply(CAM), MARK)
        server.connection.publish(topics.reply(OTHER), MARK)
        assert device.payloads() == [b"an answer"]
        assert curious.payloads() == []


@pytest.mark.parametrize("topic", [topics.reply(CAM), topics.status(EDGE), topics.status(OTHER), "anything/else"])
def test_a_device_neither_answers_nor_tells_a_status(pki: TestAuthority, broker: Broker, topic: str) -> None:
    """Replies and statuses are the servers' to write."""
    with (
        Client(broker, pki.credentials(CAM), topics.reply(CAM), topics.ALL_STATUS) as device,
        Client(broker, pki.credentials(OTHER)) as forger,
        Client(broker, pki.credentials(EDGE)) as server,
    ):
        for client in (device, forger, server):
            client.connected()
        forger.connection.publish(topic, b"forged", retain=True)
        forger.connection.publish(topics.request("edge", "fam", "s1", OTHER), b"last")
        time.sleep(0.1)
        server.connection.publish(topics.reply(CAM), MARK)
        assert device.payloads() == []


def test_a_server_takes_its_own_tier_only(pki: TestAuthority, broker: Broker) -> None:
    """An edge server is not shown what is meant for the cloud, and a server that is not listed is shown nothing."""
    cloud = topics.requests("cloud", "fam", "s1", "")
    mine, other_node = (topics.request_to(node, "fam", "s1", "+") for node in (EDGE, "edge.attic"))
    with (
        Client(broker, pki.credentials(EDGE), REQUESTS, cloud, mine, other_node) as server,
        Client(broker, pki.credentials("edge.stranger"), REQUESTS, cloud, mine) as stranger,
        Client(broker, pki.credentials(CAM)) as device,
    ):
        for client in (server, stranger, device):
            client.connected()
        device.connection.publish(topics.request("cloud", "fam", "s1", CAM), b"for the cloud")
        device.connection.publish(topics.request_to("edge.attic", "fam", "s1", CAM), b"for another node")
        device.connection.publish(topics.request_to(EDGE, "fam", "s1", CAM), b"for this node")
        device.connection.publish(REQUEST, MARK)
        assert server.payloads() == [b"for this node"]
        server.connection.publish(topics.reply("edge.stranger"), MARK)
        assert [topic for topic, _ in stranger.came] == []


def test_listed_servers_share_the_requests(pki: TestAuthority) -> None:
    """`broker.servers` lets a second server in; with a secret group no device can take its share."""
    settings = BrokerSettings(kind="mosquitto", port=0, servers=["edge.attic"], group="secret-7f3a")
    shared = topics.requests("edge", "fam", "s1", "secret-7f3a")
    guessed = topics.requests("edge", "fam", "s1", "edge")
    with (
        Broker(settings, pki.tls(EDGE)) as own,
        Client(own, pki.credentials(EDGE), shared) as first,
        Client(own, pki.credentials("edge.attic"), shared) as second,
        Client(own, pki.credentials(OTHER), guessed) as thief,
        Client(own, pki.credentials(CAM)) as device,
    ):
        for client in (first, second, thief, device):
            client.connected()
        for number in range(20):
            device.connection.publish(REQUEST, b"%d" % number)
        wait_until(lambda: len(first.came) + len(second.came) == 20)
        assert first.came
        assert second.came
        assert thief.came == []
