"""Tells systemd how the service is, by the protocol of sd_notify(3): one datagram per message."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from types import TracebackType


class Notifier:
    """Silent where systemd did not start the process. Use it with `with`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: systemd's NOTIFY_SOCKET and WATCHDOG_USEC are looked up there."""
        path = environment.get("NOTIFY_SOCKET", "")
        # A leading @ means the abstract namespace, which sockets know by a NUL.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        micro_s = environment.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(micro_s) / 1e6 if micro_s.isdigit() else None
        """How often systemd must hear of the service; None: it does not listen for that."""
        self._socket: socket.socket | None = None

    def __enter__(self) -> Notifier:
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.send("STOPPING=1")
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, *lines: str) -> None:
        """`READY=1`, `WATCHDOG=1`, `STATUS=…`. Nobody there to hear it is no error."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), self._address)
