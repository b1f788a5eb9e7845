"""The proxy that makes links bad: what it does to a real TCP connection."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kinflow_bench.shaping import CLEAR, Shape, ShapingProxy


@pytest.fixture
def proxy() -> Iterator[ShapingProxy]:
    """Before a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        with ShapingProxy("127.0.0.1", listener.getsockname()[1]) as proxy:
            yield proxy
        listener.shutdown(socket.SHUT_RDWR)


def connect(proxy: ShapingProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def echo_s(connection: socket.socket, data: bytes = b"x") -> float:
    start_s = time.monotonic()
    connection.sendall(data)
    got = b""
    while len(got) < len(data):
        got += connection.recv(65536)
    assert got == data
    return time.monotonic() - start_s


def test_delay_and_rate_are_added_in_each_direction_and_order_is_kept(proxy: ShapingProxy) -> None:
    """50 ms each way; 20 kB at 40 kB/s take half a second each way, overlapping."""
    with connect(proxy) as connection:
        echo_s(connection)
        proxy.shape = Shape(delay_s=0.05)
        assert echo_s(connection) >= 0.1
        proxy.shape = Shape(bytes_per_s=40_000)
        assert echo_s(connection, bytes(range(250)) * 80) >= 0.5
        proxy.shape = Shape(jitter_s=0.02, loss=0.5, stall_s=0.05)
        echo_s(connection, bytes(range(250)) * 200)


def test_silence_holds_everything_and_passes_it_on_later(proxy: ShapingProxy) -> None:
    """A connection is accepted and nothing comes through it, until it is."""
    with connect(proxy) as connection:
        proxy.shape = Shape(silent=True)
        connection.sendall(b"x")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.shape = CLEAR
        connection.settimeout(10)
        assert connection.recv(1) == b"x"


def test_half_open_is_for_good_and_new_connections_pass(proxy: ShapingProxy) -> None:
    """The old one is not closed, and never says anything again."""
    with connect(proxy) as old:
        echo_s(old)
        proxy.leave_half_open()
        with connect(proxy) as new:
            echo_s(new)
        old.sendall(b"x")
        old.settimeout(0.3)
        with pytest.raises(TimeoutError):
            old.recv(1)


def test_a_cut_resets_every_connection(proxy: ShapingProxy) -> None:
    """Both sides notice at once."""
    with connect(proxy) as connection:
        echo_s(connection)
        proxy.cut()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        with connect(proxy) as another:
            echo_s(another)
