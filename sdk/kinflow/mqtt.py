"""One MQTT 5 connection; the one adapter file for paho-mqtt.

paho keeps the session: CONNECT, will, SUBSCRIBE, keepalive, DISCONNECT. PUBLISH at QoS 0, the only packet
that is timed, is written and read here on `client.socket()`: through paho's own queue and callbacks, one
message costs about as much as its whole way through a broker and back. Two rules keep both sides apart.
paho is called on the network thread alone and gets none but whole packets that are not such a PUBLISH; and
all writing happens under one lock, a packet that was begun first.
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
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from kinflow import packet
from kinflow.errors import FrameError, LinkError, LinkLost, SettingsError
from kinflow.frame import MAX_FRAME_BYTES
from kinflow.stream import Inbox, OtherPacket, Outbox
from kinflow.timers import Timers

log = logging.getLogger("kinflow.link")

CONNECT_TIMEOUT_S = 3.0
RETRY_DELAYS_S = (0.2, 1.0, 2.0, 4.0, 5.0)
MAX_BACKLOG_BYTES = 4 * MAX_FRAME_BYTES
MAX_PACKET_BYTES = MAX_FRAME_BYTES + 1024
_SOCKET_BUFFER_BYTES = 512 * 1024
_CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker listens."""

    host: str
    port: int = 1883

    @classmethod
    def parse(cls, text: str, default_port: int = 1883) -> BrokerAddress:
        """From "host", "host:port" or "[v6 address]:port". Raises SettingsError."""
        wanted = f'broker {text!r}: expected "host", "host:port" or "[IPv6 address]:port"'
        host, colon, port = text.strip(), "", ""
        if host.startswith("["):
            host, bracket, rest = host[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise SettingsError(wanted)
            colon, port = rest[:1], rest[1:]
        elif host.count(":") > 1:
            raise SettingsError(f"{wanted}; an IPv6 address stands in brackets")
        else:
            host, colon, port = host.partition(":")
        if not host or any(sign.isspace() or sign in "/@" for sign in host):
            raise SettingsError(wanted)
        if not colon:
            return cls(host, default_port)
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise SettingsError(f"{wanted}; the port is a number from 1 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Connection:
    """One MQTT 5 connection with its own network thread; it reconnects by itself until closed.

    `on_message(topic, payload)`, `on_connected()` and `on_lost()` run on the network thread, `on_message`
    also on one that is in `drive`; one at a time. They must be quick; what they raise is logged. `will` is a
    (topic, payload) that the broker publishes, retained, when this connection breaks. `on_connected` runs
    after every connect, once all `subscriptions` are acknowledged.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        on_message: Callable[[str, bytes], None],
        subscriptions: Sequence[str] = (),
        will: tuple[str, bytes] | None = None,
        on_connected: Callable[[], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        keepalive_s: int = 5,
    ) -> None:
        self.address = address
        self.client_id = client_id
        self._on_message = on_message
        self._subscriptions = tuple(subscriptions)
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._keepalive_s = keepalive_s
        self._client = self._make_client(will)
        self._thread: threading.Thread | None = None
        self._timers = Timers()
        self._closing = False
        self._ready = threading.Event()
        self._socket: socket.socket | None = None  # None unless connected
        self._write_lock = threading.Lock()
        self._outbox = Outbox()
        # Whoever takes two locks takes them in this order: reading, writing. Reentrant: a callback may drive.
        self._read_lock = threading.RLock()
        self._inbox = Inbox(MAX_PACKET_BYTES)
        self._driver_lock = threading.Lock()
        self._interest: _Interest | None = None

    # Lifetime

    def start(self) -> None:
        """Start the network thread; it connects in the background."""
        if self._thread is not None:
            raise LinkError(f"connection {self.client_id} was started before: make a new one")
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

    def publish(self, topic: str, data: bytes, *, retain: bool = False) -> None:
        """Send at QoS 0. Raises LinkLost when not connected, FrameError when over the size limit.

        What the socket does not take at once is left to the network thread. Raises LinkError when more than
        MAX_BACKLOG_BYTES wait there.
        """
        if len(data) > MAX_FRAME_BYTES:
            raise FrameError(f"{topic}: {len(data)} bytes, at most {MAX_FRAME_BYTES} are sent")
        header = packet.publish_header(topic.encode(), len(data), retain)
        with self._write_lock:
            if self._socket is None:
                raise LinkLost(f"not connected to {self.address}")
            if self._outbox.size > MAX_BACKLOG_BYTES:
                raise LinkError(f"{self.address} takes no more: {self._outbox.size} bytes wait to be sent")
            try:
                if self._client.want_write():
                    self._outbox.keep(header, data)
                elif self._outbox.send(self._socket, header, data):
                    return
            except OSError as exc:  # the network thread meets it too, and connects again
                raise LinkLost(f"the connection to {self.address} broke: {exc}") from exc
        self._timers.wake()

    def call_at(self, when_s: float, fn: Callable[[], None]) -> None:
        """Run `fn` on the network thread when time.monotonic() reaches `when_s`, connected or not."""
        self._timers.add(when_s, fn)

    def drive(self, done: Callable[[], bool], until_s: float) -> None:
        """Read on the calling thread until `done()` or `until_s` (of time.monotonic()).

        What the caller waits for then comes without a switch of threads. Returns early when another thread
        drives, when the connection is down, and when there is something for the network thread to do: the
        caller then waits as if it had not called this.
        """
        if not self._driver_lock.acquire(blocking=False):
            return
        try:
            sock, interest = self._socket, self._interest
            if sock is None or interest is None or threading.current_thread() is self._thread:
                return
            interest.set(reading=False)
            try:
                poller = select.poll()
                poller.register(sock, select.POLLIN)
                while not done() and (left_s := until_s - time.monotonic()) > 0:
                    if poller.poll(left_s * 1e3) and not self._read(sock):
                        return
            finally:
                interest.set(reading=True)
        except OSError:
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
        """Open the socket and queue CONNECT; whether that worked.

        Names and SYNs may take seconds, and deadlines may not wait for them: paho's blocking connect() runs
        on a thread of its own meanwhile.
        """
        failure: list[Exception] = []
        finished = threading.Event()

        def connect() -> None:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            host, port = self.address.host, self.address.port
            try:
                self._client.connect(host, port, self._keepalive_s, clean_start=True, properties=properties)
            except Exception as exc:  # paho lets the errors of socket and resolver through
                failure.append(exc)
            finished.set()
            self._timers.wake()

        threading.Thread(target=connect, name=f"kinflow-connect-{self.client_id}", daemon=True).start()
        give_up_s = time.monotonic() + 2 * CONNECT_TIMEOUT_S
        while not finished.is_set():
            self._timers.sleep(give_up_s)
            if self._closing and time.monotonic() >= give_up_s:
                return False  # a resolver that hangs: its thread ends when it does
        if failure:
            log.debug("%s: no connection to %s: %s", self.client_id, self.address, failure[0])
        return not failure

    # Network thread: connected

    def _serve(self, epoll: select.epoll) -> bool:
        """Read, write and keep the connection alive until it is lost or closed; whether it was ever ready."""
        sock = self._own_socket()
        interest = self._interest = _Interest(epoll, sock)
        tick_s = self._keepalive_s / 4
        next_tick_s = time.monotonic() + tick_s
        try:
            while self._client.socket() is not None and not self._closing:
                if self._outbox.size or self._client.want_write() or interest.writing:
                    interest.set(writing=not self._flush())
                for fd, event in self._timers.sleep(next_tick_s):
                    if fd == sock.fileno() and event != select.EPOLLOUT and not self._read(sock):
                        self._let_paho_read(sock)
                if time.monotonic() >= next_tick_s:
                    self._client.loop_misc()
                    next_tick_s = time.monotonic() + tick_s
            was_ready = self._socket is not None
            if self._closing:
                self._say_goodbye(sock)
        finally:
            self._forget(sock, interest)
        if was_ready and not self._closing and self._on_lost is not None:
            self._guarded(self._on_lost)
        return was_ready

    def _own_socket(self) -> socket.socket:
        # A duplicate: paho may close its own at any time, which must not pull it away under a sender's feet.
        sock = self._client.socket()
        assert isinstance(sock, socket.socket)
        return sock.dup()

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

    def _let_paho_read(self, sock: socket.socket) -> None:
        """Have paho read a packet once it is all there: whether it waits for a rest cannot be asked."""
        with self._read_lock:
            try:
                head = sock.recv(packet.MAX_FIXED_HEADER_BYTES, socket.MSG_PEEK)
                size = packet.packet_bytes(head)
                if not head or self._inbox.inside_packet:
                    raise ConnectionResetError("the other side closed it")
                if size is None or len(sock.recv(size, socket.MSG_PEEK)) < size:
                    time.sleep(0.001)  # the rest is on its way
                elif not packet.is_publish(head[0]):
                    self._client.loop_read()
            except BlockingIOError:
                return
            except (OSError, FrameError) as exc:
                log.debug("%s: connection to %s broke: %s", self.client_id, self.address, exc)
                self._drop(sock)

    def _flush(self) -> bool:
        """Write what waits, a packet that was begun first; whether nothing waits any more."""
        with self._write_lock:
            sock, outbox = self._socket, self._outbox
            try:
                if sock is not None and outbox.begun and not outbox.flush(sock):
                    return False
                if self._client.want_write():
                    self._client.loop_write()
                if self._client.want_write():
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
            self._client.disconnect()
            self._client.loop_write()
        if self._client.socket() is not None:
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        """End a connection at once: its socket takes nothing more, so that paho fails to send and closes."""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self._client.disconnect()
        self._client.loop_write()

    def _forget(self, sock: socket.socket, interest: _Interest) -> None:
        self._ready.clear()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ends the sleep of a thread that drives
        with self._read_lock, self._write_lock:
            self._socket = self._interest = None
            self._inbox.clear()
            self._outbox.clear()
            interest.end()
            sock.close()

    def _guarded(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            fn(*args)
        except Exception:
            log.exception("%s: a callback failed", self.client_id)

    # paho's callbacks

    def _make_client(self, will: tuple[str, bytes] | None) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self.client_id, protocol=paho.MQTTv5)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if will is not None:
            client.will_set(will[0], will[1], qos=0, retain=True)
        client.on_connect = self._paho_connected
        client.on_subscribe = self._paho_subscribed
        client.on_disconnect = self._paho_disconnected
        client.on_socket_open = self._paho_opened
        # Set so that paho only queues what it wants to send: _flush writes it.
        client.on_socket_register_write = lambda *_: None
        return client

    def _paho_opened(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)

    def _paho_connected(
        self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.is_failure:
            log.warning("%s: %s refused the connection: %s", self.client_id, self.address, reason)
        elif self._subscriptions:
            client.subscribe([(topic, SubscribeOptions(qos=0)) for topic in self._subscriptions])
        else:
            self._become_ready()

    def _paho_subscribed(
        self, client: paho.Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [
            topic for topic, reason in zip(self._subscriptions, reasons, strict=True) if reason.is_failure
        ]
        if refused:
            log.warning("%s: %s refused to subscribe to %s", self.client_id, self.address, ", ".join(refused))
            client.disconnect()
        else:
            self._become_ready()

    def _paho_disconnected(
        self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        log.debug("%s: connection to %s ended: %s", self.client_id, self.address, reason)

    def _become_ready(self) -> None:
        assert self._interest is not None
        with self._write_lock:
            self._socket = self._interest.sock
        log.debug("%s: connected to %s", self.client_id, self.address)
        if self._on_connected is not None:
            self._guarded(self._on_connected)
        self._ready.set()


class _Interest:
    """What the network thread wants to know of the socket. Changing it takes effect in a sleep that lasts."""

    def __init__(self, epoll: select.epoll, sock: socket.socket) -> None:
        self.sock = sock
        self._epoll = epoll
        self._lock = threading.Lock()
        self._reading = True
        self.writing = False
        epoll.register(sock, select.EPOLLIN)

    def set(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        with self._lock:
            before = self._reading, self.writing
            self._reading = self._reading if reading is None else reading
            self.writing = self.writing if writing is None else writing
            if before != (self._reading, self.writing) and self.sock.fileno() >= 0:
                mask = (select.EPOLLIN if self._reading else 0) | (select.EPOLLOUT if self.writing else 0)
                self._epoll.modify(self.sock, mask)

    def end(self) -> None:
        with self._lock:
            self._epoll.unregister(self.sock)
