"""A TLS connection as an ordinary socket: one thread carries bytes between it and a pair of sockets.

mqtt.py reads and writes one socket from several threads, looks ahead in it and sleeps on it. A TLS connection
allows none of this: one thread alone may use it, what it has decrypted is invisible to poll(), and reading may
have to wait for writing. So that thread is here, and plain TCP pays nothing for it.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time

log = logging.getLogger("kinflow.link")

_CHUNK_BYTES = 64 * 1024
# After the near side has closed, what it sent last gets this long to leave.
_FLUSH_TIMEOUT_S = 1.0


class Tunnel:
    """Owns `secured`, a connected TLS socket after its handshake. `near` is the socket to use instead."""

    def __init__(self, secured: ssl.SSLSocket, name: str) -> None:
        self.near, self._far = socket.socketpair()
        self._secured = secured
        self._name = name
        self._up = memoryview(b"")
        self._down = memoryview(b"")
        self._near_closed_s: float | None = None
        self._wants_write = False
        self._thread = threading.Thread(target=self._run, name=f"kinflow-tls-{name}", daemon=True)

    def start(self) -> None:
        self._secured.setblocking(False)
        self._far.setblocking(False)
        self._thread.start()

    def join(self, timeout_s: float = 2 * _FLUSH_TIMEOUT_S) -> None:
        """Wait until what the closed near side sent is out, so that a process may end then."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with self._secured, self._far:
            try:
                while self._carry():
                    self._sleep()
            except ssl.SSLError as exc:  # such as the broker's alert that it does not accept our certificate
                log.warning("%s: the TLS connection ended: %s", self._name, exc.reason or exc)
            except OSError as exc:
                log.debug("%s: the TLS connection broke: %s", self._name, exc)
            with contextlib.suppress(OSError, ValueError):
                self._secured.unwrap()  # says goodbye; nobody waits for the answer

    def _carry(self) -> bool:
        """Move bytes both ways until nothing moves any more; False at the end of either side."""
        moved = True
        while moved:
            moved = self._carry_down()
            if self._far_ended:
                return False
            moved = self._carry_up() or moved
            if self._near_closed_s is not None and (
                not self._up or time.monotonic() > self._near_closed_s + _FLUSH_TIMEOUT_S
            ):
                return False
        return True

    _far_ended = False

    def _carry_up(self) -> bool:
        if not self._up and self._near_closed_s is None:
            with contextlib.suppress(BlockingIOError):
                self._up = memoryview(self._far.recv(_CHUNK_BYTES))
                if not self._up:
                    self._near_closed_s = time.monotonic()
        if not self._up:
            return False
        sent = 0
        self._wants_write = False
        try:
            sent = self._secured.send(self._up)
        except ssl.SSLWantWriteError:
            self._wants_write = True
        except ssl.SSLWantReadError:
            pass
        # Cut only by what was sent: OpenSSL wants the same bytes again.
        self._up = self._up[sent:]
        return sent > 0

    def _carry_down(self) -> bool:
        if not self._down:
            try:
                self._down = memoryview(self._secured.recv(_CHUNK_BYTES))
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                self._wants_write = True
                return False
            if not self._down:
                self._far_ended = True
                return False
        try:
            sent = self._far.send(self._down)
        except BlockingIOError:
            return False
        except BrokenPipeError:  # the near side is closed; what it sent may still be on its way up
            sent = len(self._down)
        self._down = self._down[sent:]
        return sent > 0

    def _sleep(self) -> None:
        poller = select.poll()
        near = (select.POLLIN if not self._up and self._near_closed_s is None else 0) | (
            select.POLLOUT if self._down else 0
        )
        secured = (0 if self._down else select.POLLIN) | (select.POLLOUT if self._wants_write else 0)
        if near:
            poller.register(self._far, near)
        poller.register(self._secured, secured)
        poller.poll(None if self._near_closed_s is None else _FLUSH_TIMEOUT_S * 1e3)
