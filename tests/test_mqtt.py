"""One MQTT connection against real brokers: what is sent arrives."""

from __future__ import annotations

import math
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from brokers import KINDS, TestBroker, running
from kinflow.errors import FrameError, LinkLost, SettingsError
from kinflow.frame import MAX_FRAME_BYTES
from kinflow.mqtt import BrokerAddress, Connection
from listener import Listener

NOWHERE = BrokerAddress("127.0.0.1", 9)


@pytest.fixture(scope="module", params=KINDS)
def broker(request: pytest.FixtureRequest) -> Iterator[TestBroker]:
    with running(request.param) as broker:
        yield broker


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("edge.local", "edge.local", 1883),
        (" 10.0.0.2:8883 ", "10.0.0.2", 8883),
        ("[fe80::1]:1884", "fe80::1", 1884),
        ("[::1]", "::1", 1883),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    """Each documented form is read, and printed so that it can be read again."""
    address = BrokerAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert BrokerAddress.parse(str(address)) == address


@pytest.mark.parametrize("text", ["", ":1883", "host:", "host:0", "host:70000", "host:x", "::1", "[::1", "mqtt://host"])
def test_bad_addresses(text: str) -> None:
    """Anything else is a SettingsError that names what came and what is expected."""
    with pytest.raises(SettingsError, match="expected"):
        BrokerAddress.parse(text)


def test_constructor_starts_nothing() -> None:
    """A connection that was only made has no thread and no descriptor, and refuses to publish."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    connection = Connection(NOWHERE, "idle", on_message=lambda *_: None)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert not connection.connected
    with pytest.raises(LinkLost):
        connection.publish("t", b"")
    connection.close()


def test_close_leaves_nothing_behind(broker: TestBroker) -> None:
    """After close no thread and no descriptor is left, connected before or not."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Listener(broker.address, "some/topic"):
        assert threading.active_count() > before[0]
    with Connection(NOWHERE, "unlucky", on_message=lambda *_: None) as connection:
        assert not connection.wait_connected(0.3)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.mark.parametrize("size", [0, 1, 100, 20_000, 1_000_000, MAX_FRAME_BYTES])
def test_what_is_published_arrives(broker: TestBroker, size: int) -> None:
    """Payloads from nothing to the size limit arrive as they were sent."""
    data = random.Random(size).randbytes(size)
    with Listener(broker.address, "size/+") as listener:
        listener.connection.publish(f"size/{size}", data)
        assert listener.received.get(timeout=10) == (f"size/{size}", data)


def test_several_are_published_at_once(broker: TestBroker) -> None:
    """All arrive, in order, on their own topics; one that is too large lets none out."""
    messages = [(f"all/{number}", bytes((number,)) * size) for number, size in enumerate((0, 1, 300, 70_000))]
    with Listener(broker.address, "all/+") as listener:
        with pytest.raises(FrameError, match="at most"):
            listener.connection.publish_all([("all/lost", b""), ("all/large", bytes(MAX_FRAME_BYTES + 1))])
        listener.connection.publish_all([])
        listener.connection.publish_all(messages)
        assert [listener.received.get(timeout=10) for _ in messages] == messages


def test_too_much_is_refused(broker: TestBroker) -> None:
    """One byte over the limit is a FrameError, and the connection goes on."""
    with Listener(broker.address, "limit") as listener:
        with pytest.raises(FrameError, match="at most"):
            listener.connection.publish("limit", bytes(MAX_FRAME_BYTES + 1))
        listener.connection.publish("limit", b"small")
        assert listener.received.get(timeout=10) == ("limit", b"small")


def test_retained_messages_wait_for_the_subscriber(broker: TestBroker) -> None:
    """A retained message reaches who subscribes later; the same topic emptied does not."""
    with Listener(broker.address) as sender:
        sender.connection.publish("kept/one", b"here", retain=True)
        sender.connection.publish("kept/two", b"gone", retain=True)
        sender.connection.publish("kept/two", b"", retain=True)
        time.sleep(0.1)
        with Listener(broker.address, "kept/+") as late:
            assert late.received.get(timeout=10) == ("kept/one", b"here")
            with pytest.raises(queue.Empty):
                late.received.get(timeout=0.2)


def test_many_threads_publish_whole_packets(broker: TestBroker) -> None:
    """Packets of eight threads never mix on the wire, and keep the order of each thread."""
    with Listener(broker.address, "mix/+") as receiver, Listener(broker.address) as sender:

        def publish(number: int) -> None:
            for count in range(50):
                size = random.Random(number * 1000 + count).choice((3, 500, 40_000))
                sender.connection.publish(f"mix/{number}", bytes((count,)) * size)

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        counts = dict.fromkeys((f"mix/{number}" for number in range(8)), 0)
        for _ in range(400):
            topic, data = receiver.received.get(timeout=20)
            assert set(data) == {counts[topic]}
            counts[topic] += 1
        for thread in threads:
            thread.join()


def test_keepalive_holds_an_idle_connection(broker: TestBroker) -> None:
    """A connection without messages stays for more than two keepalives."""
    with Listener(broker.address, "quiet", keepalive_s=1) as listener:
        time.sleep(3)
        assert (listener.connects, listener.losses) == (1, 0)


WILL = """
import sys, time
from kinflow.mqtt import BrokerAddress, Connection
address = BrokerAddress.parse(sys.argv[1])
connection = Connection(address, "mortal", on_message=print, will=("will", b"offline"))
connection.start()
assert connection.wait_connected(10)
if sys.argv[2] == "close":
    connection.close()
else:
    print("connected", flush=True)
    time.sleep(60)
"""


def test_the_will_is_told_after_a_kill_and_only_then(broker: TestBroker) -> None:
    """A process that closes its connection leaves no will; one that is killed leaves its will, retained."""
    command = [sys.executable, "-c", WILL, str(broker.address)]
    with Listener(broker.address, "will") as listener:
        subprocess.run([*command, "close"], check=True, timeout=30)
        with pytest.raises(queue.Empty):
            listener.received.get(timeout=0.5)
        with subprocess.Popen([*command, "stay"], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"connected\n"
            child.kill()
        assert listener.received.get(timeout=15) == ("will", b"offline")
    if broker.kind == "mosquitto":  # rumqttd delivers a will without retaining it
        with Listener(broker.address, "will") as late:
            assert late.received.get(timeout=10) == ("will", b"offline")
            late.connection.publish("will", b"", retain=True)


def test_calls_are_made_without_a_connection() -> None:
    """A timed call is made on the network thread, in time, while no broker can be reached."""
    with Connection(NOWHERE, "timer", on_message=lambda *_: None) as connection:
        made: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        due_s = time.monotonic() + 0.3
        connection.call_at(due_s, lambda: made.put((time.monotonic(), threading.current_thread().name)))
        when_s, thread = made.get(timeout=5)
        assert due_s <= when_s < due_s + 0.2
        assert thread == "kinflow-mqtt-timer"


def test_the_waiting_thread_reads_itself(broker: TestBroker) -> None:
    """A message that comes while a thread drives is delivered there; otherwise on the network thread."""
    with Listener(broker.address, "drive") as listener:
        listener.connection.publish("drive", b"1")
        assert listener.received.get(timeout=10)[1] == b"1"
        assert {thread.name for thread in listener.threads} == {f"kinflow-mqtt-{listener.connection.client_id}"}
        listener.threads.clear()
        listener.connection.publish("drive", b"2")
        listener.connection.drive(lambda: not listener.received.empty(), time.monotonic() + 10)
        assert listener.received.get(timeout=10)[1] == b"2"
        # The network thread may have been first, when it was already reading.
        assert len(listener.threads) == 1
        listener.connection.publish("drive", b"3")
        assert listener.received.get(timeout=10)[1] == b"3"


def test_a_driver_outlasts_pings(broker: TestBroker) -> None:
    """A thread that drives for longer than the keepalive still drives, and the connection stands."""
    with Listener(broker.address, "drive", keepalive_s=1) as listener:
        threading.Timer(2.5, lambda: listener.connection.publish("drive", b"late")).start()
        listener.connection.drive(lambda: not listener.received.empty(), math.inf)
        assert listener.received.get(timeout=0)[1] == b"late"
        assert listener.threads == {threading.current_thread()}
        assert (listener.connects, listener.losses) == (1, 0)


def test_a_callback_that_fails_is_survived(broker: TestBroker, caplog: pytest.LogCaptureFixture) -> None:
    """What a callback raises is logged; the next message is delivered."""
    got: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def on_message(_topic: str, data: bytes) -> None:
        if data == b"bad":
            raise ValueError("as planned")
        got.put(data)

    with Connection(broker.address, "clumsy", on_message=on_message, subscriptions=["clumsy"]) as connection:
        assert connection.wait_connected(10)
        connection.publish("clumsy", b"bad")
        connection.publish("clumsy", b"good")
        assert got.get(timeout=10) == b"good"
    assert "as planned" in caplog.text
