"""One MQTT 5 connection with its own network thread.

session.py (paho) keeps the session. PUBLISH at QoS 0, the only packet that is timed, is written and read here:
through paho's queue and callbacks one message costs about as much as its whole way through a broker and back.
Both sides share a socket by two rules. The session runs on the network thread alone, and is given none but
whole packets that are not such a PUBLISH. All writing happens under one lock, and a packet that was begun is
finished first.
"""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from kinflow import packet
from kinflow.address import BrokerAddress
from kinflow.errors import FrameError, LinkError, LinkLost
from kinflow.frame import MAX_FRAME_BYTES, Buffer
from kinflow.session import CONNECT_TIMEOUT_S, MAX_PACKET_BYTES, Session
from kinflow.stream import Inbox, Interest, OtherPacket, Outbox
from kinflow.timers import Timers
from kinflow.tls import Credentials

__all__ = ["BrokerAddress", "Connection"]

log = logging.getLogger("kinflow.link")

RETRY_DELAYS_S = (0.2, 0.5, 1.0, 2.0)
MAX_BACKLOG_BYTES = 4 * MAX_FRAME_BYTES
_CLOSE_TIMEOUT_S = 1.0


class Connection:
    """One MQTT 5 connection with its own network thread; it reconnects by itself until closed.

    `on_message(topic, payload)`, `on_connected()` and `on_lost()` run on the network thread, `on_message`
    also on one that is in `drive`; one at a time. They must be quick; what they raise is logged. `will` is a
    (topic, payload) that the broker publishes, retained, when this connection breaks. `on_connected` runs
    after every connect, once all `subscriptions` are acknowledged. `login`: user name and password.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_message: Callable[[str, memoryview], None],
        subscriptions: Sequence[str] = (),
        will: tuple[str, bytes] | None = None,
        on_connected: Callable[[], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        login: tuple[str, str] | None = None,
        keepalive_s: int = 5,
        tls: Credentials | None = None,
    ) -> None:
        self.address = address
        self.client_id = client_id
        self._on_message = on_message
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._tick_s = keepalive_s / 4
        self._session = Session(
            address,
            client_id,
            subscriptions=subscriptions,
            will=will,
            login=login,
            keepalive_s=keepalive_s,
            on_ready=self._become_ready,
            tls=tls,
        )
        self._thread: threading.Thread | None = None
        self._timers = Timers()
        self._closing = False
        self._ready = threading.Event()
        self._socket: socket.socket | None = None  # None unless connected
        self._interest: Interest | None = None
        self._outbox = Outbox()
        self._inbox = Inbox(MAX_PACKET_BYTES)
        # Whoever takes several locks takes them in this order. Reading is reentrant: a callback may drive.
        self._driver_lock = threading.Lock()
        self._read_lock = threading.RLock()
        self._write_lock = threading.Lock()

    # Lifetime

    def start(self) -> None:
        """Start the network thread; it connects in the background."""
        if self._thread is not None or self._closing:
            raise LinkError(f"connection {self.client_id} was started or closed before: make a new one")
        self._thread = threading.Thread(
            target=self._run, args=(self._timers.open(),), name=f"kinflow-mqtt-{self.client_id}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Send what waits and DISCONNECT (so the will is not published), and end the thread.

        Not for callbacks: they run inside what this waits for.
        """
        self._closing = True
        self._timers.wake()
        if self._thread is not None:
            self._thread.join()
            self._session.linger()
        self._timers.close()

    def __enter__(self) -> Connection:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """The broker accepted the connection and every subscription."""
        return self._socket is not None

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until connected, at most `timeout_s`; whether it is."""
        return self._ready.wait(timeout_s)

    # For any thread

    def publish(self, topic: str, *data: Buffer, retain: bool = False) -> None:
        """Send at QoS 0; `data` may come in parts. Raises LinkLost when not connected, FrameError when too large.

        What the socket does not take at once is left to the network thread. Raises LinkError when more than
        MAX_BACKLOG_BYTES wait there.
        """
        self._send((_header(topic, sum(map(len, data)), retain), *data))

    def publish_all(self, messages: Sequence[tuple[str, Buffer]]) -> None:
        """`publish` several at once, each a (topic, payload): all are sent, or none."""
        whole: list[Buffer] = []
        for topic, data in messages:
            whole += _header(topic, len(data), False), data
        if whole:
            self._send((b"".join(whole),))

    def _send(self, whole: Sequence[Buffer]) -> None:
        """One packet in parts, or several whole ones as one part."""
        with self._write_lock:
            if self._socket is None:
                raise LinkLost(f"not connected to {self.address}")
            if self._outbox.size > MAX_BACKLOG_BYTES:
                raise LinkError(f"{self.address} takes no more: {self._outbox.size} bytes wait to be sent")
            try:
                if self._session.wants_write:
                    self._outbox.keep(whole)
                elif self._outbox.send(self._socket, whole):
                    return
            except OSError as exc:  # the network thread meets it too, and connects again
                raise LinkLost(f"the connection to {self.address} broke: {exc}") from exc
        self._timers.wake()

    def renew(self) -> None:
        """Give the present connection up, as one that nothing comes through any more, and make another one."""
        with self._write_lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)  # the network thread sees the end, and does the rest

    def call_at(self, when_s: float, fn: Callable[[], None]) -> None:
        """Run `fn` on the network thread when time.monotonic() reaches `when_s`, connected or not."""
        self._timers.add(when_s, fn)

    def drive(self, done: Callable[[], bool], until_s: float) -> None:
        """Read on the calling thread until `done()` or `until_s` (of time.monotonic()).

        What the caller waits for then comes without a switch of threads. Returns early when another thread
        drives and when the connection is down or goes down: the caller then waits as if it had not called.
        A worker may pass math.inf: close() ends it.
        """
        if done() or not self._driver_lock.acquire(blocking=False):
            return
        try:
            sock, interest = self._socket, self._interest
            if sock is None or interest is None or threading.current_thread() is self._thread:
                return
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            interest.set(reading=False)
            try:
                while not done() and self._socket is sock and (left_s := until_s - time.monotonic()) > 0:
                    if poller.poll(min(left_s, 3600) * 1e3) and not self._read(sock):
                        # A ping's answer, or the end: leave the socket to the network thread for a moment.
                        interest.set(reading=True)
                        time.sleep(0.001)
                        interest.set(reading=False)
            finally:
                interest.set(reading=True)
        except (OSError, ValueError):
            return  # closed meanwhile
        finally:
            self._driver_lock.release()

    # Network thread: connecting

    def _run(self, epoll: select.epoll) -> None:
        attempt = 0
        while not self._closing:
            if self._open() and self._serve(epoll):
                attempt = 0
            base_s = RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]
            # Many clients of one broker must not come back in the same moment.
            until_s = time.monotonic() + base_s * random.uniform(0.6, 1.0)
            while not self._closing and time.monotonic() < until_s:
                self._timers.sleep(until_s)
            attempt += 1

    def _open(self) -> bool:
        """Open the socket; whether that worked.

        That may take seconds, and deadlines may not wait for it: it happens on a thread of its own.
        """
        outcome: list[bool] = []

        def connect() -> None:
            try:
                self._session.connect()
                outcome.append(True)
            except LinkLost as exc:
                log.debug("%s: %s", self.client_id, exc)
                outcome.append(False)
            self._timers.wake()

        threading.Thread(target=connect, name=f"kinflow-connect-{self.client_id}", daemon=True).start()
        give_up_s = time.monotonic() + 2 * CONNECT_TIMEOUT_S
        while not outcome:
            self._timers.sleep(give_up_s if time.monotonic() < give_up_s else time.monotonic() + 1)
            if self._closing and time.monotonic() >= give_up_s:
                return False  # a resolver that hangs: its thread ends when it does
        return outcome[0]

    # Network thread: connected

    def _serve(self, epoll: select.epoll) -> bool:
        """Look after the connection until it is lost or closed; whether it was ever ready."""
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(self._session.duplicate_socket())
                interest = self._interest = Interest(epoll, sock)
                stack.callback(self._forget, sock, interest)
                self._look_after(sock, interest)
                if self._closing:
                    self._say_goodbye(sock)
            except LinkLost as exc:
                log.debug("%s: %s", self.client_id, exc)
            except Exception:  # whatever the other side makes paho raise
                log.exception("%s: connection to %s given up", self.client_id, self.address)
            was_ready = self._socket is not None
        if was_ready and not self._closing and self._on_lost is not None:
            self._guarded(self._on_lost)
        return was_ready

    def _look_after(self, sock: socket.socket, interest: Interest) -> None:
        next_tick_s = time.monotonic() + self._tick_s
        while self._session.open and not self._closing:
            if self._outbox.size or self._session.wants_write or interest.writing:
                interest.set(writing=not self._flush())
            for fd, event in self._timers.sleep(next_tick_s):
                if fd == sock.fileno() and event != select.EPOLLOUT and not self._read(sock):
                    self._let_session_read(sock)
            if time.monotonic() >= next_tick_s:
                self._session.tick()
                next_tick_s = time.monotonic() + self._tick_s

    def _become_ready(self) -> None:
        assert self._interest is not None
        with self._write_lock:
            self._socket = self._interest.sock
        log.debug("%s: connected to %s", self.client_id, self.address)
        if self._on_connected is not None:
            self._guarded(self._on_connected)
        self._ready.set()

    def _read(self, sock: socket.socket) -> bool:
        """Read and deliver what is there of one PUBLISH; False when something else comes next."""
        with self._read_lock:
            try:
                whole = self._inbox.receive(sock)
            except (OtherPacket, FrameError, OSError):
                return False
            if whole is not None:
                try:
                    topic, data = packet.split_publish(whole)
                except FrameError as exc:
                    log.warning("%s: %s", self.client_id, exc)
                else:
                    self._guarded(self._on_message, topic, data)
            return True

    def _let_session_read(self, sock: socket.socket) -> None:
        with self._read_lock:
            try:
                head = sock.recv(packet.MAX_FIXED_HEADER_BYTES, socket.MSG_PEEK)
                if not head or self._inbox.inside_packet:
                    raise LinkLost(f"{self.address} closed the connection")
                size = packet.packet_bytes(head)
                if size is None or len(sock.recv(size, socket.MSG_PEEK)) < size:
                    time.sleep(0.001)  # the rest is on its way
                elif not packet.is_publish(head[0]):
                    self._session.read()
            except BlockingIOError:
                return
            except (OSError, FrameError) as exc:
                raise LinkLost(f"the connection to {self.address} broke: {exc}") from exc

    def _flush(self) -> bool:
        """Write what waits, a packet that was begun first; whether nothing waits any more."""
        with self._write_lock:
            sock, outbox = self._socket, self._outbox
            try:
                if sock is not None and outbox.begun and not outbox.flush(sock):
                    return False
                if self._session.wants_write:
                    self._session.write()
                if self._session.wants_write:
                    return False
                return sock is None or outbox.flush(sock)
            except OSError:
                return True  # reading meets the end

    def _say_goodbye(self, sock: socket.socket) -> None:
        until_s = time.monotonic() + _CLOSE_TIMEOUT_S
        poller = select.poll()
        poller.register(sock, select.POLLOUT)
        while not self._flush() and (left_s := until_s - time.monotonic()) > 0:
            poller.poll(left_s * 1e3)
        with self._write_lock:
            self._session.disconnect()

    def _forget(self, sock: socket.socket, interest: Interest) -> None:
        self._ready.clear()
        # No more sending; and a thread that drives wakes up, sees the end and lets go.
        self._guarded(self._session.drop, sock)
        with self._read_lock, self._write_lock:
            self._socket = self._interest = None
            self._inbox.clear()
            self._outbox.clear()
            interest.end()

    def _guarded(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            fn(*args)
        except Exception:
            log.exception("%s: %s failed", self.client_id, fn)


def _header(topic: str, data_bytes: int, retain: bool) -> bytes:
    if data_bytes > MAX_FRAME_BYTES:
        raise FrameError(f"{topic}: {data_bytes} bytes, at most {MAX_FRAME_BYTES} are sent")
    return packet.publish_header(topic.encode(), data_bytes, retain)
