"""Where answers go: standard output, a file, MQTT and Home Assistant. A sink that fails does not stop the device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from kinflow import topics
from kinflow.address import BrokerAddress
from kinflow.errors import LinkError, SettingsError
from kinflow.mqtt import Connection
from kinflow.runtime import homeassistant
from kinflow.runtime.report import Report
from kinflow.settings import MqttSettings


class Sink(Protocol):
    """Opened with `with`."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, report: Report) -> None:
        """Raises OSError or LinkError; the next report is tried all the same."""


class Lines:
    """A JSON object per line. A file is opened for each: it may be moved away at any time (logrotate)."""

    def __init__(self, path: Path | None, stream: TextIO | None = None) -> None:
        """`path` None: `stream`, or standard output."""
        self._path = path
        self._stream = stream or sys.stdout

    def __enter__(self) -> Lines:
        if self._path is not None:
            try:
                self._path.open("a").close()
            except OSError as exc:
                raise SettingsError(f"output {self._path}: {exc.strerror}") from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, report: Report) -> None:
        line = json.dumps(report.record(), ensure_ascii=False) + "\n"
        if self._path is None:
            self._stream.write(line)
            self._stream.flush()
        else:
            # In one piece, so that a full disk leaves no half line behind a whole one.
            with self._path.open("ab", buffering=0) as file:
                file.write(line.encode())


class Mqtt:
    """Publishes each report, retained, on a topic of the device's own; says online and, by its will, offline.

    With Home Assistant, the device's entities are announced at every connection and at each birth message.
    """

    def __init__(self, settings: MqttSettings, device: str, model: str, labels: list[str]) -> None:
        """`model`: the board's. Raises SettingsError for an address or a password file that cannot be used."""
        self._device = device
        self._configs: list[tuple[str, bytes]] = []
        birth: tuple[str, ...] = ()
        if settings.home_assistant:
            self._configs = homeassistant.announcement(settings.discovery_prefix, device, model, labels)
            birth = (homeassistant.birth_topic(settings.discovery_prefix),)
        self._last = b""
        self._connection = Connection(
            BrokerAddress.parse(settings.broker),
            f"kinflow-{device}-{os.urandom(3).hex()}",
            on_message=self._message,
            subscriptions=birth,
            will=(topics.device_online(device), homeassistant.OFFLINE),
            on_connected=self._announce,
            login=_login(settings),
        )

    def __enter__(self) -> Mqtt:
        self._connection.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection.connected:
            self._try_publish(topics.device_online(self._device), homeassistant.OFFLINE)
        self._connection.close()

    def write(self, report: Report) -> None:
        self._last = json.dumps(report.record(), ensure_ascii=False).encode()
        self._connection.publish(topics.device_state(self._device), self._last, retain=True)

    def _announce(self) -> None:
        for topic, payload in self._configs:
            self._try_publish(topic, payload)
        self._try_publish(topics.device_online(self._device), homeassistant.ONLINE)
        if self._last:
            self._try_publish(topics.device_state(self._device), self._last)

    def _message(self, _topic: str, payload: memoryview) -> None:
        # Home Assistant has restarted: it knows retained entities again, but not those somebody deleted there.
        if payload == homeassistant.ONLINE:
            self._announce()

    def _try_publish(self, topic: str, payload: bytes) -> None:
        try:
            self._connection.publish(topic, payload, retain=True)
        except LinkError:
            return  # lost again: the next connection announces


def _login(settings: MqttSettings) -> tuple[str, str] | None:
    if not settings.username:
        return None
    if not settings.password_file:
        return settings.username, ""
    try:
        return settings.username, Path(settings.password_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"service.mqtt.password_file {settings.password_file}: {exc}") from exc
