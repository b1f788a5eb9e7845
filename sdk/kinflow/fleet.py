"""Edge and cloud servers as child processes on loopback: for the demo, the benchmarks and tests.

Real commands, real brokers, real sockets; only the machine is one instead of three. Each server's broker binds a
free port of 127.0.0.1.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinflow import children
from kinflow.errors import LinkError

READY_TIMEOUT_S = 60.0
LOOPBACK = "127.0.0.1"


@dataclass
class ServerProcess:
    """One running server command."""

    name: str
    tier: str
    process: subprocess.Popen[bytes]
    ready: dict[str, Any] = field(default_factory=dict)
    """What the server said when it was ready: node, tier, broker, broker_kind, broker_pid, …"""
    events: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    """What it said later."""
    errors: list[str] = field(default_factory=list)
    """The last lines of its standard error."""
    reader: threading.Thread = field(default_factory=threading.Thread)

    @property
    def broker(self) -> str:
        return str(self.ready["broker"])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Fleet:
    """Started and stopped with `with`. `start` adds a server and returns when it is ready.

    Several come up in less time when each is launched before the first is waited for.
    """

    def __init__(self, bundles: Sequence[str | Path]) -> None:
        self._bundles = [str(bundle) for bundle in bundles]
        self.servers: dict[str, ServerProcess] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_exc: object) -> None:
        # Edge servers first: what they have escalated is still answered.
        for server in reversed(list(self.servers.values())):
            children.stop(server.process)

    def start_cloud_and_edge(self, *options: str) -> tuple[ServerProcess, ServerProcess]:
        """The usual pair, the edge server escalating to the cloud server. `options` go to both commands."""
        cloud = self.start("cloud", *options)
        edge = self.start("edge", "--upstream", cloud.broker, *options)
        return cloud, edge

    def start(self, tier: str, *options: str, name: str = "") -> ServerProcess:
        """`launch`, and wait until it is ready."""
        return self.wait(self.launch(tier, *options, name=name))

    def launch(self, tier: str, *options: str, name: str = "") -> ServerProcess:
        """Run `kinflow <tier>`."""
        name = name or tier
        command = [sys.executable, "-m", "kinflow", tier, *self._bundles, "--json"]
        command += ["--node", f"{name}-{time.time_ns() % 10**8:08d}"]
        if "--broker" not in options:
            command += ["--listen", LOOPBACK]
            if "--port" not in options:
                command += ["--port", "0"]
        process = children.spawn([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        server = ServerProcess(name, tier, process)
        self.servers[name] = server
        threading.Thread(target=_read_events, args=(server,), daemon=True).start()
        server.reader = threading.Thread(target=_read_lines, args=(process, server.errors), daemon=True)
        server.reader.start()
        return server

    def wait(self, server: ServerProcess) -> ServerProcess:
        """Until it is ready. Raises LinkError with the server's own words when it does not get that far."""
        try:
            server.ready = server.events.get(timeout=READY_TIMEOUT_S)
        except queue.Empty:
            server.ready = {"event": "silent"}
        if server.ready["event"] != "ready":
            status = children.stop(server.process)
            server.reader.join(1.0)
            said = " ".join(server.errors[-3:])
            raise LinkError(f"`kinflow {server.tier}` did not get ready, status {status}: {said}")
        return server

    def news(self) -> list[str]:
        """A line for each thing that happened to a server since the last call: died, broker restarted."""
        lines = []
        for server in list(self.servers.values()):
            while not server.events.empty():
                said = server.events.get()
                if said["event"] == "broker-restarted":
                    lines.append(f"the {server.name} server's broker died and was restarted (pid {said['broker_pid']})")
            if not server.alive:
                del self.servers[server.name]
                lines.append(f"the {server.name} server (pid {server.pid}) died, status {server.process.returncode}")
        return lines


def _read_events(server: ServerProcess) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        try:
            server.events.put(json.loads(line))
        except json.JSONDecodeError:
            continue
    server.events.put({"event": "closed"})


def _read_lines(process: subprocess.Popen[bytes], lines: list[str]) -> None:
    """Keeps the last lines: a pipe that nobody reads would stop the server."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.decode(errors="replace").strip())
        del lines[:-20]
