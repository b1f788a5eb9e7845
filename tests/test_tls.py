"""Mutual TLS against a real mosquitto: what crosses, who gets in, who is believed, who is thrown out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from authority import TestAuthority
from brokers import KINDS, wait_until
from kinflow import frame, topics
from kinflow.errors import BrokerError, SettingsError
from kinflow.link import Link
from kinflow.mqtt import BrokerAddress
from kinflow.settings import BrokerSettings, TlsSettings
from kinflow.tls import Credentials, refuse_plain
from kinflow_edge.broker import Broker
from tls_site import CAM, EDGE, OTHER, REQUEST, REQUESTS, Client, mosquitto_with

pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")
pytestmark = pytest.mark.skipif("mosquitto" not in KINDS, reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> TestAuthority:
    return TestAuthority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def broker(pki: TestAuthority) -> Iterator[Broker]:
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as broker:
        yield broker


def test_messages_of_every_size_cross(pki: TestAuthority, broker: Broker) -> None:
    """From nothing to the largest frame, both ways at once: TLS records and MQTT packets cut each other anywhere."""
    sizes = [0, 1, 100, 16_383, 16_384, 16_385, 65_536, 300_001, frame.MAX_FRAME_BYTES]
    sent = [os.urandom(size) for size in sizes]
    with (
        Client(broker, pki.credentials(EDGE), REQUESTS) as server,
        Client(broker, pki.credentials(CAM), topics.reply(CAM)) as device,
    ):
        server.connected()
        device.connected()

        def reply() -> None:
            for data in sent:
                server.connection.publish(topics.reply(CAM), data)

        thread = threading.Thread(target=reply)
        thread.start()
        for data in sent:
            device.connection.publish(REQUEST, data)
        thread.join()
        wait_until(lambda: len(server.came) == len(sent) == len(device.came), 60)
        assert [data for _, data in server.came] == sent
        assert [data for _, data in device.came] == sent


def test_what_was_published_before_close_arrives(pki: TestAuthority, broker: Broker) -> None:
    """close() waits for the tunnel's thread: a process may end right after it."""
    script = """
import sys
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.settings import TlsSettings
from kinflow.tls import Credentials
tls = Credentials.load(TlsSettings(folder=sys.argv[2]))
address = BrokerAddress.parse(sys.argv[1])
with Connection(address, "brief", on_message=print, tls=tls, will=(sys.argv[3], b"will")) as connection:
    assert connection.wait_connected(10)
    connection.publish(sys.argv[3], bytes(1_000_000))
"""
    with Client(broker, pki.credentials(EDGE), REQUESTS) as server:
        server.connected()
        command = [sys.executable, "-c", script, str(broker.address), pki.tls(CAM).folder, REQUEST]
        subprocess.run(command, check=True, timeout=60)
        wait_until(lambda: server.came != [])
        time.sleep(0.2)
        assert [len(data) for _, data in server.came] == [1_000_000]


def test_without_a_certificate_nobody_gets_in(pki: TestAuthority, broker: Broker, tmp_path: Path) -> None:
    """Plain TCP, and a certificate of another authority: neither is connected, the owner's own is."""
    foreign = TestAuthority(tmp_path)
    mixed = tmp_path / "mixed"  # their own certificate, but our authority to trust
    shutil.copytree(foreign.tls(CAM).folder, mixed)
    with (
        Client(broker, None) as plain,
        Client(broker, foreign.credentials(CAM)) as suspicious,
        Client(broker, pki.credentials(CAM)) as device,
    ):
        device.connected()
        assert not plain.connection.wait_connected(1)
        assert not suspicious.connection.wait_connected(0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for chain in (None, mixed):
        assert _alert(broker.address, context, chain)


def _alert(address: BrokerAddress, context: ssl.SSLContext, chain: Path | None) -> bool:
    """Whether the broker ends the connection, although the client would trust anybody."""
    if chain is not None:
        context.load_cert_chain(chain / "cert.pem", chain / "key.pem")
    with socket.create_connection((address.host, address.port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw) as secured:
                return secured.recv(1) == b""
        except ssl.SSLError:
            return True


def test_old_tls_is_refused(pki: TestAuthority, broker: Broker) -> None:
    """TLS 1.1 gets no connection, 1.2 does."""
    folder = Path(pki.tls(CAM).folder)
    for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.check_hostname = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        with socket.create_connection((broker.address.host, broker.address.port), timeout=10) as raw:
            if works:
                with context.wrap_socket(raw) as secured:
                    assert secured.version() == "TLSv1.2"
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    context.wrap_socket(raw)


@pytest.mark.parametrize("impostor", ["device.clever", "foreign"])
def test_a_false_broker_is_not_believed(
    pki: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture, impostor: str
) -> None:
    """A broker with a device's certificate of this family, or with a server's of another, gets nothing sent."""
    tls = TestAuthority(tmp_path).tls(EDGE) if impostor == "foreign" else pki.tls(impostor)
    with mosquitto_with(Path(tls.folder), tmp_path) as address, Link(address, "dev", tls=pki.credentials(CAM)) as link:
        assert not link.wait_connected(2)
    assert "no TLS connection" in caplog.text


def test_a_server_of_another_name_can_be_refused(pki: TestAuthority, broker: Broker) -> None:
    """`tls.server` pins one: every other server of the family is refused."""
    with Link(broker.address, "dev", tls=pki.credentials(CAM, server=EDGE)) as link:
        assert link.wait_connected(10)
    with Link(broker.address, "dev", tls=pki.credentials(CAM, server="edge.garden")) as link:
        assert not link.wait_connected(1)


def test_a_revoked_device_is_thrown_out_and_the_others_stay(tmp_path: Path) -> None:
    """The list is copied into the server's folder: within seconds the revoked one is out, without a restart by hand."""
    pki = TestAuthority(tmp_path)
    with (
        Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as own,
        Client(own, pki.credentials(CAM)) as good,
        Client(own, pki.credentials(OTHER)) as bad,
    ):
        good.connected()
        bad.connected()
        assert not own.restart_if_stale()
        pki.revoke(OTHER, EDGE)
        wait_until(own.restart_if_stale)
        wait_until(lambda: not bad.connection.connected)
        good.connected()
        time.sleep(1)
        assert not bad.connection.connected
        assert not own.restart_if_stale()


def test_a_broken_list_does_not_stop_the_broker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a file arrived: the broker goes on with what it has, also when it has to be started again, and says why."""
    pki = TestAuthority(tmp_path)
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as own:
        pid = own.pid
        (tmp_path / EDGE / "crl.pem").write_text("-----BEGIN X509 CRL-----\nMIIB")
        wait_until(lambda: own.restart_if_stale() or "keeps its old certificates" in caplog.text)
        assert own.pid == pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(own.restart_if_dead)
        with Client(own, pki.credentials(CAM)) as client:
            client.connected()


def test_a_revoked_server_is_not_believed(tmp_path: Path) -> None:
    """A device that has the list refuses a server that stands in it, at its next connection."""
    pki = TestAuthority(tmp_path)
    device = pki.credentials(CAM)
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as own:
        with Client(own, device) as before:
            before.connected()
        pki.revoke(EDGE, CAM)
        with Client(own, device) as after:
            assert not after.connection.wait_connected(1)


def test_a_renewed_certificate_is_used_at_the_next_connection(tmp_path: Path) -> None:
    """Certificates are read for each connection: a device need not restart."""
    pki = TestAuthority(tmp_path)
    device = pki.credentials(CAM)
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as own:
        pki.revoke(CAM, EDGE)
        wait_until(own.restart_if_stale)
        with Client(own, device) as client:
            assert not client.connection.wait_connected(1)
            shutil.rmtree(tmp_path / CAM)
            pki.tls(CAM)
            client.connected()


def test_only_a_server_runs_a_broker(pki: TestAuthority) -> None:
    """With a device's certificate it refuses at once; the embedded broker has no TLS, so it is refused too."""
    with pytest.raises(SettingsError, match="not a server's"):
        Broker(BrokerSettings(port=0), pki.tls(CAM))
    with pytest.raises(BrokerError, match="embedded broker has no TLS"):
        Broker(BrokerSettings(kind="embedded", port=0), pki.tls(EDGE)).__enter__()


def test_the_broker_s_copies_are_private(pki: TestAuthority) -> None:
    """The key that mosquitto reads is readable for its account alone, and gone with the broker."""
    with Broker(BrokerSettings(kind="mosquitto", port=0), pki.tls(EDGE)) as own:
        assert own._folder is not None
        folder = Path(own._folder.name)
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("*.pem")}
        assert set(modes) == {"ca.pem", "cert.pem", "key.pem", "crl.pem"}
        assert set(modes.values()) == {0o600}
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_a_folder_that_does_not_fit_is_named(pki: TestAuthority, tmp_path: Path) -> None:
    """Nothing there, a foreign authority, a key of another certificate, an encrypted key: each is said at once."""
    with pytest.raises(SettingsError, match=r"nowhere.*ca\.pem"):
        Credentials.load(TlsSettings(folder=str(tmp_path / "nowhere")))
    mixed = tmp_path / "mixed"
    shutil.copytree(pki.tls(CAM).folder, mixed)
    shutil.copy(Path(pki.tls(OTHER).folder) / "key.pem", mixed / "key.pem")
    with pytest.raises(SettingsError, match=r"cert\.pem and key\.pem"):
        Credentials.load(TlsSettings(folder=str(mixed)))
    shutil.copy(pki.folder / "pki/ca.key", mixed / "key.pem")
    with pytest.raises(SettingsError, match=r"cert\.pem and key\.pem"):
        Credentials.load(TlsSettings(folder=str(mixed)))
    foreign = tmp_path / "foreign"
    shutil.copytree(pki.tls(CAM).folder, foreign)
    shutil.copy(TestAuthority(tmp_path / "other").folder / "pki/ca.pem", foreign / "ca.pem")
    (foreign / "crl.pem").unlink()
    with pytest.raises(SettingsError, match=r"cert\.pem is not valid here"):
        Credentials.load(TlsSettings(folder=str(foreign)))


def test_plain_connections_stay_on_loopback() -> None:
    """Beyond it TLS is needed, or the express wish to do without."""
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1"):
        assert not refuse_plain(TlsSettings(), host)
    for host in ("192.0.2.10", "0.0.0.0", "broker.local", "::", "127.example.org"):
        assert "insecure_lan" in refuse_plain(TlsSettings(), host)
        assert not refuse_plain(TlsSettings(insecure_lan=True), host)
        assert not refuse_plain(TlsSettings(folder="x"), host)
