"""A TCP proxy in user space that makes a good link bad: delay, jitter, loss as stalls, a rate, silence, a cut.

TCP hides loss: what an application sees of it is that everything stands still until the retransmission. So that
is what is done here, and bytes keep their order.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Awaitable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

CHUNK_BYTES = 4096
# What waits in one direction of one connection; then the sender feels the pressure, as on a real link.
MAX_QUEUE = 64
POLL_S = 0.02


@dataclass(frozen=True)
class Shape:
    """What is done to each direction of every connection."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to that much more, evenly spread."""
    loss: float = 0.0
    """Share of the chunks that are lost the first time, and come `stall_s` later."""
    stall_s: float = 0.3
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    silent: bool = False
    """Accepts, and passes nothing on."""


CLEAR = Shape()


class ShapingProxy:
    """Listens on a free port of 127.0.0.1 while the `with` block lasts. `shape` may be set at any time."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self.shape = CLEAR
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shaping-proxy", daemon=True)
        self._connections: set[_Connection] = set()
        self._server: asyncio.AbstractServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> ShapingProxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset every connection; new ones pass."""
        self._run(self._drop())

    def leave_half_open(self) -> None:
        """The connections that are there now stay open and silent for good; new ones pass."""
        for connection in list(self._connections):
            connection.dead = True

    def _run(self, work: Awaitable[None]) -> None:
        async def call() -> None:
            await work

        asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._drop()
        tasks = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drop(self) -> None:
        for connection in list(self._connections):
            connection.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            while self.shape.silent:
                await asyncio.sleep(POLL_S)
            there, back = await asyncio.open_connection(*self._target)
            connection.writers.append(back)
            ways = [self._pump(connection, reader, back), self._pump(connection, there, writer)]
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # nobody at the target: the client is told by the closed connection; or this proxy ends
        finally:
            connection.close()
            self._connections.discard(connection)

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read, and write each chunk when its time has come."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_QUEUE)
        sender = asyncio.ensure_future(self._send(connection, queue, writer))
        free_s = 0.0
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                shape, now_s = self.shape, self._loop.time()
                due_s = now_s + shape.delay_s + shape.jitter_s * random.random()
                if random.random() < shape.loss:
                    due_s += shape.stall_s
                free_s = max(free_s, due_s) + (len(chunk) / shape.bytes_per_s if shape.bytes_per_s else 0.0)
                await queue.put((free_s, chunk))
        except OSError:
            pass
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send(
        self, connection: _Connection, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due_s, chunk = await queue.get()
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            while connection.dead or self.shape.silent:
                await asyncio.sleep(POLL_S)
            writer.write(chunk)
            await writer.drain()


class _Connection:
    """One client's, with the writers of both sides."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers: list[Any] = [writer]
        self.dead = False

    def close(self) -> None:
        for writer in self.writers:
            if (transport := writer.transport) is not None:
                transport.abort()
