"""A bare TCP echo through a relay: what the network itself costs. Three processes, blocking sockets, nothing else.

`python -m kinflow_bench.echo server|relay [TARGET_PORT]` prints its port and serves one connection.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from contextlib import AbstractContextManager

from kinflow import children
from kinflow.fleet import LOOPBACK

_LENGTHS = struct.Struct("<II")
BUFFER_BYTES = 1 << 18


class Echo(AbstractContextManager["Echo"]):
    """Client of a relay in front of a server; `round_trip_ms(up, down)` sends and gets that many bytes."""

    def __enter__(self) -> Echo:
        self._processes: list[subprocess.Popen[bytes]] = []
        server_port = self._spawn("server")
        self._socket = _connect(self._spawn("relay", str(server_port)))
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()
        for process in self._processes:
            children.stop(process)

    def round_trip_ms(self, up: int, down: int) -> float:
        message = _LENGTHS.pack(up, down) + bytes(up)
        start = time.perf_counter()
        self._socket.sendall(message)
        _receive(self._socket, down)
        return (time.perf_counter() - start) * 1e3

    def _spawn(self, *arguments: str) -> int:
        process = children.spawn([sys.executable, "-m", __name__, *arguments], stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())


def _serve(role: str, target: int) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        client, _ = listener.accept()
    _tune(client)
    onward = _connect(target) if role == "relay" else None
    while True:
        lengths = _receive(client, _LENGTHS.size)
        if not lengths:
            return
        up, down = _LENGTHS.unpack(lengths)
        body = _receive(client, up)
        if onward is None:
            client.sendall(body[:down] if down <= up else bytes(down))
        else:
            onward.sendall(lengths + body)
            client.sendall(_receive(onward, down))


def _connect(port: int) -> socket.socket:
    opened = socket.create_connection((LOOPBACK, port))
    _tune(opened)
    return opened


def _tune(opened: socket.socket) -> None:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        opened.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _receive(opened: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; fewer only when the other side has closed."""
    data = bytearray(size)
    view = memoryview(data)
    filled = 0
    while filled < size:
        count = opened.recv_into(view[filled:])
        if count == 0:
            return b""
        filled += count
    return bytes(data)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
