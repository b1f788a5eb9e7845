"""The broker as a server's child process: real mosquitto and the embedded one, killed, crowded out and orphaned."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from brokers import KINDS, wait_until
from kinflow import frame
from kinflow.errors import BrokerError
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.settings import BrokerSettings
from kinflow_edge import broker as module
from kinflow_edge.broker import Broker
from system_fixtures import LOOPBACK, alive

TOPIC = "kinflow/v1/node/test/status"

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where brokers make their folders in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def echo(address: BrokerAddress, size: int) -> bool:
    """Whether `size` bytes published there come back whole."""
    data, came, arrived = os.urandom(size), [], threading.Event()

    def on_message(_topic: str, payload: bytes) -> None:
        came.append(payload)
        arrived.set()

    with Connection(address, f"echo-{os.urandom(4).hex()}", on_message=on_message, subscriptions=[TOPIC]) as client:
        assert client.wait_connected(10)
        client.publish(TOPIC, data)
        assert arrived.wait(10)
    return came == [data]


@each_kind
def test_a_started_broker_carries_messages(kind: str) -> None:
    """A port of its own, MQTT 5, and a payload far above the 20 kB that rumqttd takes by default."""
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        assert broker.kind == kind
        assert broker.address.port > 0
        assert broker.pid is not None
        assert alive(broker.pid)
        assert echo(broker.address, 10)
        assert echo(broker.address, 500_000)


@each_kind
def test_the_largest_frame_passes(kind: str) -> None:
    """The broker's own limit lies above the one that kinflow keeps to."""
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        assert echo(broker.address, frame.MAX_FRAME_BYTES)


@each_kind
def test_a_killed_broker_is_started_again_at_its_address(kind: str) -> None:
    """Devices know the port: a broker that died must come back there, as a new process."""
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        before, pid = broker.address, broker.pid
        assert pid is not None
        assert not broker.restart_if_dead()
        assert broker.pid == pid
        os.kill(pid, signal.SIGKILL)
        wait_until(broker.restart_if_dead)
        assert broker.address == before
        assert broker.pid != pid
        assert echo(broker.address, 100)
        assert not broker.restart_if_dead()


@pytest.mark.skipif("mosquitto" not in KINDS, reason="mosquitto is not installed")
def test_what_is_retained_survives_a_killed_mosquitto() -> None:
    """Other servers' statuses at this broker must not wait for their next renewal."""
    with Broker(BrokerSettings(kind="mosquitto", port=0)) as broker:
        assert broker.pid is not None
        with Connection(broker.address, "teller", on_message=lambda _topic, _data: None) as client:
            assert client.wait_connected(10)
            client.publish(TOPIC, b"retained", retain=True)
        time.sleep(2.5)  # mosquitto saves on its own clock, once a second
        os.kill(broker.pid, signal.SIGKILL)
        wait_until(broker.restart_if_dead)
        came: list[bytes] = []
        with Connection(
            broker.address, "reader", on_message=lambda _topic, data: came.append(data), subscriptions=[TOPIC]
        ):
            wait_until(lambda: came == [b"retained"])


@each_kind
def test_stopping_leaves_no_process_and_no_folder(kind: str, folder: Path) -> None:
    """A demo on a laptop must not leave anything behind."""
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        pid = broker.pid
        assert pid is not None
        assert len(list(folder.iterdir())) == 1
    assert not alive(pid)
    assert list(folder.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((broker.address.host, broker.address.port), timeout=1).close()


@each_kind
def test_stopping_one_that_died_is_harmless(kind: str, folder: Path) -> None:
    """The server may end before it has seen that its broker died."""
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
    assert list(folder.iterdir()) == []


@each_kind
def test_a_taken_port_is_named_with_the_way_out(kind: str, folder: Path) -> None:
    """Another broker on 1883 is usual: the error names the port and both ways out, and leaves no folder."""
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} of {LOOPBACK} is in use.*--broker.*--port"):
            Broker(BrokerSettings(kind=kind, port=port)).__enter__()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("port", [0, 18830])
@each_kind
def test_an_address_that_is_not_here_is_a_named_error(kind: str, port: int, folder: Path) -> None:
    """A broker can bind only addresses of this machine; a typo must not end in a traceback."""
    with pytest.raises(BrokerError, match=r"203\.0\.113\.7"):
        Broker(BrokerSettings(kind=kind, listen="203.0.113.7", port=port)).__enter__()
    assert list(folder.iterdir()) == []


@each_kind
def test_a_listen_address_that_is_none_is_a_named_error(kind: str, folder: Path) -> None:
    """`listen` is an address; what else stands there is named."""
    with pytest.raises(BrokerError, match=r"no\.such\.host\.invalid"):
        Broker(BrokerSettings(kind=kind, listen="no.such.host.invalid", port=0)).__enter__()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("listen", ["0.0.0.0", "10.1.2.3"])
def test_the_embedded_broker_stays_on_loopback(listen: str, folder: Path) -> None:
    """It accepts anybody: beyond loopback it is refused, with what to install instead."""
    with pytest.raises(BrokerError, match=rf"embedded broker.*{listen}.*mosquitto"):
        Broker(BrokerSettings(kind="embedded", listen=listen, port=0)).__enter__()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif("embedded" not in KINDS, reason="iotcore is not installed: pip install 'kinflow[broker]'")
def test_auto_is_the_embedded_broker_where_mosquitto_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A fresh laptop has no mosquitto; asked for by name, it is an error that says how to get it."""
    nowhere = str(tmp_path_factory.mktemp("empty"))
    monkeypatch.setenv("PATH", nowhere)
    monkeypatch.setattr(module, "EXTRA_PATH", nowhere)
    with Broker(BrokerSettings(port=0)) as broker:
        assert broker.kind == "embedded"
    with pytest.raises(BrokerError, match="apt install mosquitto"):
        Broker(BrokerSettings(kind="mosquitto", port=0)).__enter__()


def test_a_named_broker_is_used_and_never_touched() -> None:
    """Home Assistant's broker is not ours to start, watch or stop."""
    with (
        Broker(BrokerSettings(kind=KINDS[0], port=0)) as theirs,
        Broker(BrokerSettings(address=str(theirs.address))) as broker,
    ):
        assert (broker.kind, broker.pid, broker.address) == ("external", None, theirs.address)
        assert not broker.restart_if_dead()
        assert theirs.pid is not None
        assert alive(theirs.pid)


ORPHAN = """
import sys, time
from kinflow.settings import BrokerSettings
from kinflow_edge.broker import Broker
with Broker(BrokerSettings(kind=sys.argv[1], port=0)) as broker:
    print(broker.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of their parent's death")
@each_kind
def test_a_broker_does_not_outlive_a_server_that_is_killed(kind: str, folder: Path) -> None:
    """kill -9 gives the server no chance to stop its broker: the kernel does."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, kind], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)}
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert alive(pid)
        server.kill()
    try:
        wait_until(lambda: not alive(pid))
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
