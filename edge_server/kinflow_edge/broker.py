"""The MQTT broker a server uses: a running one, or a child process configured here.

mosquitto where it is installed; otherwise the embedded one (iotcore: rumqttd in a wheel), which accepts
anybody and has no ACL, so it is refused beyond loopback.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kinflow import children, frame
from kinflow.errors import BrokerError, SettingsError
from kinflow.identity import Identity
from kinflow.mqtt import BrokerAddress
from kinflow.settings import BrokerSettings, TlsSettings
from kinflow.tls import CERT, Credentials
from kinflow_edge import mosquitto

log = logging.getLogger("kinflow.broker")

START_TIMEOUT_S = 10.0
# glibc's malloc would give a large message's memory back and ask for it again with the next one.
KEEP_MEMORY = {"MALLOC_TOP_PAD_": str(1 << 20)}
# A certificate that was changed a moment ago may not be there whole.
SETTLE_S = 1.0
# Debian installs mosquitto where an ordinary user's PATH does not look.
EXTRA_PATH = "/usr/local/sbin:/usr/sbin:/sbin"

# rumqttd caps payloads at 20 kB until told otherwise, and speaks MQTT 5 only on a [v5] listener.
EMBEDDED_CONFIG = """\
id = 0
[router]
id = 0
max_connections = 4096
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "kinflow"
listen = "{listen}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {max_packet_bytes}
max_inflight_count = 200
dynamic_filters = true
"""


class Broker:
    """`with Broker(settings) as broker:` has a broker at `broker.address` until the block ends."""

    def __init__(self, settings: BrokerSettings, tls: TlsSettings | None = None) -> None:
        """Raises SettingsError when there are credentials, and they are not a valid server's."""
        self._settings = settings
        self._tls = tls or TlsSettings()
        self.credentials = Credentials.load(self._tls)
        if self.credentials is not None and not self.credentials.identity.is_server:
            raise SettingsError(f"tls.folder {self._tls.folder} is {self.credentials.identity}'s, not a server's")
        self._servers = [Identity.parse(server) for server in settings.servers]
        self._files: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._port = settings.port
        self.kind = "external" if settings.address else ""

    @property
    def address(self) -> BrokerAddress:
        """Where the server itself reaches the broker."""
        if self._settings.address:
            return BrokerAddress.parse(self._settings.address)
        listen = self._settings.listen
        return BrokerAddress("127.0.0.1" if listen == "0.0.0.0" else listen, self._port)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Broker:
        if not self._settings.address:
            self._folder = tempfile.TemporaryDirectory(prefix="kinflow-broker-")
            try:
                self._start()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._process is not None:
            children.stop(self._process)
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def restart_if_dead(self) -> bool:
        """Start it again when the process ended by itself. True when that was so."""
        if self._process is None or self._process.poll() is None:
            return False
        log.warning("broker died kind=%s pid=%s status=%s", self.kind, self._process.pid, self._process.returncode)
        self._start()
        return True

    def restart_if_stale(self) -> bool:
        """Start it again when certificates or revocations have changed: whoever is revoked is disconnected.

        mosquitto would read the files again without that, but keep every connection. True when they had changed.
        """
        if self._process is None or self.credentials is None or self._times() == self._files:
            return False
        if time.time() - max(self._times().values(), default=0) / 1e9 < SETTLE_S:
            return False  # perhaps still being copied
        try:
            self.credentials = Credentials.load(self._tls)
        except SettingsError as exc:
            log.warning("the broker keeps its old certificates: %s", exc)
            self._files = self._times()
            return False
        children.stop(self._process)
        self._start()
        return True

    def _times(self) -> dict[str, int]:
        files = {} if self.credentials is None else self.credentials.files()
        return {name: path.stat().st_mtime_ns for name, path in files.items()}

    def _start(self) -> None:
        listen = self._settings.listen
        self.kind, command = _choose(self._settings.kind, listen, certified=self.credentials is not None)
        free_port = _free_port(listen)
        self._port = self._port or free_port
        if _accepts(self.address):
            raise BrokerError(
                f"port {self._port} of {listen} is in use: name that broker with --broker {self.address}, "
                "or another port with --port"
            )
        assert self._folder is not None
        # rumqttd tells the format by the ending; mosquitto takes any.
        config = Path(self._folder.name) / "broker.toml"
        errors = Path(self._folder.name) / "broker.err"
        account = _account(self.kind)
        self._hand_over(Path(self._folder.name), account)
        config.write_text(self._configuration(Path(self._folder.name)))
        with errors.open("wb") as stream:
            # Paths relative to the folder: what lies above it may be closed to the broker's account.
            self._process = children.spawn(
                [*command, config.name],
                stdout=stream,
                stderr=stream,
                cwd=self._folder.name,
                env={**os.environ, **KEEP_MEMORY},
                **account,
            )
        self._wait_until_ready(errors)
        log.info("broker started kind=%s address=%s pid=%s", self.kind, self.address, self._process.pid)

    def _configuration(self, folder: Path) -> str:
        listen = self._settings.listen
        if self.kind == "mosquitto":
            return mosquitto.configuration(listen, self._port, [path.name for path in folder.glob("*.pem")])
        return EMBEDDED_CONFIG.format(listen=listen, port=self._port, max_packet_bytes=frame.MAX_FRAME_BYTES + 1024)

    def _hand_over(self, folder: Path, account: dict[str, Any]) -> None:
        """Copy the credentials to where the broker's account may read them, and nobody else."""
        given = [folder]
        if self.credentials is not None:
            for name, path in self._valid_files(folder).items():
                given.append(_write_private(folder / name, path.read_bytes()))
            servers = [self.credentials.identity, *self._servers]
            given.append(_write_private(folder / mosquitto.ACL, mosquitto.access_list(servers).encode()))
        if account:
            for path in given:
                os.chown(path, account["user"], account["group"])

    def _valid_files(self, copies: Path) -> dict[str, Path]:
        """What is to be copied: nothing where the broker has copies already and a file has come to harm since."""
        assert self.credentials is not None
        self._files = self._times()
        try:
            Credentials.load(self._tls)
        except SettingsError as exc:
            if not (copies / CERT).exists():
                raise
            log.warning("the broker keeps its old certificates: %s", exc)
            return {}
        return self.credentials.files()

    def _wait_until_ready(self, errors: Path) -> None:
        assert self._process is not None
        give_up = time.monotonic() + START_TIMEOUT_S
        while not _accepts(self.address):
            status = self._process.poll()
            if status is not None or time.monotonic() > give_up:
                last = errors.read_text(errors="replace").strip().splitlines()[-1:]
                what = f"ended with status {status}" if status is not None else "does not accept connections"
                raise BrokerError(f"{self.kind} at {self.address} {what}: {' '.join(last) or 'it printed nothing'}")
            time.sleep(0.02)


def _write_private(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
    return path


def _choose(kind: str, listen: str, *, certified: bool) -> tuple[str, list[str]]:
    """(kind, command without its configuration file)"""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=EXTRA_PATH)
    if kind == "mosquitto" or (kind == "auto" and program):
        if program is None:
            raise BrokerError("mosquitto is not installed: apt install mosquitto, or broker.kind = 'embedded'")
        return "mosquitto", [program, "-c"]
    if certified:
        raise BrokerError("the embedded broker has no TLS: install mosquitto, or leave tls.folder out")
    if not _is_loopback(listen):
        raise BrokerError(f"the embedded broker has no access control, so it may not bind {listen}: install mosquitto")
    if find_spec("iotcore") is None:
        raise BrokerError("no broker: apt install mosquitto, pip install 'kinflow[broker]', or name one with --broker")
    return (
        "embedded",
        [sys.executable, "-m", "iotcore", "--log-level", "CRITICAL", "--config"],
    )


def _account(kind: str) -> dict[str, Any]:
    """Popen's options for the account it runs under, where it is not ours.

    As root mosquitto would change to its own account by itself, and the kernel then forgets that it is to end
    with its parent: so it is started under that account.
    """
    if kind != "mosquitto" or os.geteuid() != 0:
        return {}
    for name in ("mosquitto", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    return {}


def _accepts(address: BrokerAddress) -> bool:
    try:
        with socket.create_connection((address.host, address.port), timeout=0.5):
            return True
    except OSError:
        return False


def _is_loopback(listen: str) -> bool:
    try:
        return ipaddress.IPv4Address(listen).is_loopback
    except ValueError as exc:
        raise BrokerError(f"broker.listen is {listen!r}: expected an IPv4 address of this machine") from exc


def _free_port(listen: str) -> int:
    try:
        with socket.socket() as probe:
            probe.bind((listen, 0))
            return int(probe.getsockname()[1])
    except OSError as exc:
        raise BrokerError(
            f"broker.listen is {listen!r}, which cannot be bound ({exc.strerror}): "
            "expected an IPv4 address of this machine, or 0.0.0.0 for all of them"
        ) from exc
