"""One MQTT connection whose broker is killed, frozen, silent, or no broker at all: what breaks comes back."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow import mqtt
from kinflow.errors import LinkError, LinkLost
from kinflow.mqtt import MAX_BACKLOG_BYTES, BrokerAddress, Connection
from listener import Listener


@pytest.fixture(params=KINDS)
def own_broker(request: pytest.FixtureRequest) -> Iterator[TestBroker]:
    """For tests that kill or freeze it."""
    with running(request.param) as broker:
        yield broker


def test_a_broker_that_takes_nothing_is_waited_for_within_bounds(own_broker: TestBroker) -> None:
    """While the broker is frozen publishing never blocks, too much is a LinkError, all the rest arrives."""
    with Listener(own_broker.address, "flood", keepalive_s=60) as listener:
        sent = 0
        with own_broker.frozen(), pytest.raises(LinkError, match="wait to be sent"):  # noqa: PT012
            while sent * 1_000_000 < 2 * MAX_BACKLOG_BYTES:
                start_s = time.monotonic()
                listener.connection.publish("flood", bytes((sent,)) * 1_000_000)
                assert time.monotonic() - start_s < 1
                sent += 1
        assert sent > 10
        for number in range(sent):
            topic, data = listener.received.get(timeout=20)
            assert (topic, data[0], len(data)) == ("flood", number, 1_000_000)


def test_a_killed_broker_is_found_again_and_resubscribed(own_broker: TestBroker) -> None:
    """After a restart of the broker the connection stands again, its subscriptions with it."""
    with Listener(own_broker.address, "again") as listener:
        own_broker.kill()
        wait_until(lambda: listener.losses == 1)
        assert not listener.connection.connected
        with pytest.raises(LinkLost):
            listener.connection.publish("again", b"nobody")
        own_broker.bring_back()
        assert listener.connection.wait_connected(10)
        wait_until(lambda: listener.connects == 2)
        listener.connection.publish("again", b"back")
        assert listener.received.get(timeout=10) == ("again", b"back")


def test_a_silent_broker_is_given_up(own_broker: TestBroker) -> None:
    """A broker that neither answers nor closes is found out by keepalive."""
    with Listener(own_broker.address, "t", keepalive_s=1) as listener, own_broker.frozen():
        start_s = time.monotonic()
        wait_until(lambda: listener.losses == 1)
        assert 0.5 < time.monotonic() - start_s < 6


def test_a_driver_is_let_go_when_the_connection_ends(own_broker: TestBroker) -> None:
    """Neither the broker's death nor close() leaves a thread hanging in drive."""
    with Listener(own_broker.address, "t") as listener:
        for end in (own_broker.kill, listener.connection.close):
            ended = threading.Event()

            def drive(ended: threading.Event = ended) -> None:
                listener.connection.drive(lambda: False, math.inf)
                ended.set()

            thread = threading.Thread(target=drive, daemon=True)
            thread.start()
            time.sleep(0.1)
            end()
            assert ended.wait(5)
            if end == own_broker.kill:
                own_broker.bring_back()
                assert listener.connection.wait_connected(10)


CONNACK, SUBACK = b"\x20\x03\x00\x00\x00", b"\x90\x04\x00\x01\x00\x00"


def test_a_peer_that_talks_nonsense_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes in place of MQTT, also after a proper beginning, the connection tries again."""
    monkeypatch.setattr(mqtt, "RETRY_DELAYS_S", (0.001,))
    noise = random.Random(3)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Connection(
            BrokerAddress("127.0.0.1", server.getsockname()[1]),
            "patient",
            on_message=lambda *_: None,
            subscriptions=["t"],
            keepalive_s=1,
        ) as connection,
    ):
        server.settimeout(20)
        for attempt in range(60):
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                begin = (b"", CONNACK, CONNACK + SUBACK)[attempt % 3]
                first = noise.choice((0x20, 0x30, 0x32, 0x90, 0xD0, 0xE0, noise.randrange(256)))
                size = noise.randrange(100)
                peer.sendall(begin + bytes((first, size)) + noise.randbytes(size + noise.randrange(3)))
        peer, _ = server.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(CONNACK + SUBACK)
            assert connection.wait_connected(10)
