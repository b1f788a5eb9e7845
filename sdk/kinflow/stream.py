"""PUBLISH packets over a non-blocking socket: what does not fit waits, what is not complete is kept."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Sequence

from kinflow.frame import Buffer
from kinflow.packet import MAX_FIXED_HEADER_BYTES, is_publish, packet_bytes

log = logging.getLogger("kinflow.link")


class OtherPacket(Exception):
    """What comes next is not a PUBLISH at QoS 0, or the end of the stream."""


class Outbox:
    """Packets on their way out, in order. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: deque[memoryview] = deque()
        self.size = 0
        """Bytes that wait."""
        self.begun = False
        """Whether the first packet that waits is on the wire in part: then nothing else may be sent."""

    def send(self, sock: socket.socket, packet: Sequence[Buffer]) -> bool:
        """Send one, given in parts, after what waits already; whether nothing waits then.

        Lets the socket's OSError through.
        """
        if self._waiting:
            self.keep(packet)
            return self.flush(sock)
        try:
            sent = sock.sendmsg(packet)
        except BlockingIOError:
            sent = 0
        if sent == sum(map(len, packet)):
            return True
        self.keep(packet)
        self._took(sent)
        return False

    def keep(self, packet: Sequence[Buffer]) -> None:
        """Let one wait for `flush`."""
        whole = memoryview(b"".join(packet))
        self._waiting.append(whole)
        self.size += len(whole)

    def flush(self, sock: socket.socket) -> bool:
        """Send what waits; whether nothing does any more. Lets the socket's OSError through."""
        while self._waiting:
            try:
                self._took(sock.send(self._waiting[0]))
            except BlockingIOError:
                return False
        return True

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self.size = 0
        self.begun = False

    def _took(self, sent: int) -> None:
        self.size -= sent
        if sent == len(self._waiting[0]):
            self._waiting.popleft()
            self.begun = False
        else:
            self._waiting[0] = self._waiting[0][sent:]
            self.begun = self.begun or sent > 0


class Inbox:
    """The PUBLISH that is being received; one over `limit_bytes` is thrown away. Not thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._left = 0
        self._packet = bytearray()
        self._too_long = False

    @property
    def inside_packet(self) -> bool:
        """Whether the next byte of the socket belongs to a packet that was begun."""
        return self._left > 0

    def receive(self, sock: socket.socket) -> bytes | bytearray | None:
        """A whole PUBLISH, None when it is not all there.

        Raises OtherPacket (and leaves that packet on the socket), FrameError when the stream is not MQTT, and
        lets the socket's OSError through.
        """
        try:
            if self._left == 0:
                # Looked at, not taken: whatever is not for us stays whole for paho.
                head = sock.recv(MAX_FIXED_HEADER_BYTES, socket.MSG_PEEK)
                size = packet_bytes(head) if head and is_publish(head[0]) else None
                if size is None:
                    raise OtherPacket
                whole = sock.recv(size) if size <= self._limit_bytes else b""
                if len(whole) == size:
                    return whole
                self._left = size - len(whole)
                # Too long a packet passes through this, and only its end would stay.
                self._packet = bytearray(min(size, self._limit_bytes))
                self._packet[: len(whole)] = whole
                self._too_long = size > self._limit_bytes
            return self._receive_more(sock)
        except BlockingIOError:
            return None

    def clear(self) -> None:
        """Forget what was received."""
        self._left = 0
        self._packet = bytearray()

    def _receive_more(self, sock: socket.socket) -> bytearray | None:
        view = memoryview(self._packet)
        count = sock.recv_into(view[-self._left :] if self._left < len(view) else view)
        if count == 0:
            raise ConnectionResetError("the connection ended inside a packet")
        self._left -= count
        if self._left:
            return None
        whole, self._packet = self._packet, bytearray()
        if self._too_long:
            log.warning("a packet over %d bytes was thrown away", self._limit_bytes)
            return None
        return whole


class Interest:
    """What a thread that sleeps on `epoll` wants to know of a socket.

    Any thread may change it, and the change takes effect in a sleep that lasts.
    """

    def __init__(self, epoll: select.epoll, sock: socket.socket) -> None:
        self.sock = sock
        self._epoll = epoll
        self._lock = threading.Lock()
        self._reading = True
        self.writing = False
        epoll.register(sock, select.EPOLLIN)

    def set(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Change one, or both. Raises OSError after the end."""
        with self._lock:
            before = self._reading, self.writing
            self._reading = self._reading if reading is None else reading
            self.writing = self.writing if writing is None else writing
            if before != (self._reading, self.writing):
                mask = (select.EPOLLIN if self._reading else 0) | (select.EPOLLOUT if self.writing else 0)
                self._epoll.modify(self.sock, mask)

    def end(self) -> None:
        """Before the socket is closed."""
        with self._lock:
            self._epoll.unregister(self.sock)
