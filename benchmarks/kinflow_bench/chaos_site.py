"""What chaos is done to: two edge servers and a cloud server with their brokers, a bad link before each, and devices.

Every server is a process of the usual command; each is reached through a ShapingProxy that stays where it is while
the server is killed and started again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec

from kinflow import children
from kinflow.errors import LinkError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.messages import Tier
from kinflow_bench.chaos_clock import FalseClock, Unavailable, environment
from kinflow_bench.chaos_devices import Ended, Job, Row
from kinflow_bench.shaping import ShapingProxy

SERVERS = ("edge-a", "edge-b", "cloud")
LAST_ANSWERS_S = 60.0
"""What devices get for what still waits in their outboxes."""


class Site:
    """The servers, their links, and what the devices said so far."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle = bundle
        self.folder = folder
        self.fleet = Fleet([bundle])
        self.servers: dict[str, ServerProcess] = {}
        self.links: dict[str, ShapingProxy] = {}
        """By server: between devices and it; `up` stands between the edge servers and the cloud."""
        self.rows: list[Row] = []
        self.ended: list[Ended] = []
        """What the processes of devices said last."""
        self.devices_clock: FalseClock | None = None
        """Of the first process of devices."""
        self._ports: dict[str, int] = {}
        self._devices: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._starts = 0
        self._stack = ExitStack()

    def __enter__(self) -> Site:
        with ExitStack() as stack:
            stack.enter_context(self.fleet)
            for name in SERVERS:
                self._ports[name] = _free_port()
                self.links[name] = stack.enter_context(ShapingProxy("127.0.0.1", self._ports[name]))
            self.links["up"] = stack.enter_context(ShapingProxy("127.0.0.1", self._ports["cloud"]))
            stack.callback(self.stop_devices)
            self.start_together("cloud", "edge-a", "edge-b")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # Servers

    def start(self, name: str) -> None:
        """Start a server on its port."""
        self.start_together(name)

    def start_together(self, *names: str) -> None:
        """Several: they come up beside each other."""
        for name in names:
            self.servers[name] = self._launch(name)
        for name in names:
            self.fleet.wait(self.servers[name])

    def _launch(self, name: str) -> ServerProcess:
        """A name of its own for each start: nobody mistakes the new one for the old."""
        self._starts += 1
        tier = "cloud" if name == "cloud" else "edge"
        upstream = ("--upstream", self.links["up"].address) if tier == "edge" else ()
        options = ("--port", str(self._ports[name]), "--no-advertise", *upstream)
        return self.fleet.launch(tier, *options, name=f"{name}-{self._starts}")

    @contextmanager
    def beside(self, tier: Tier, bundles: Sequence[Path], *options: str) -> Iterator[ServerProcess]:
        """One more server for a while."""
        with Fleet(bundles) as fleet:
            yield fleet.start(tier, *options)

    def node(self, name: str) -> str:
        return str(self.servers[name].ready["node"])

    def kill(self, name: str) -> None:
        server = self.servers[name]
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait()
        self._wait_for_port(name)

    def stop(self, name: str) -> None:
        """As an operator does: SIGTERM, and it drains."""
        self.servers[name].process.terminate()
        self.servers[name].process.wait(30)
        self._wait_for_port(name)

    def false_clock(self) -> FalseClock:
        """A new one. Raises Unavailable."""
        # Not in this bench's folder, which only its owner may read.
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kinflow-clock-")))
        place.chmod(0o755)
        return FalseClock(place)

    def broker_pid(self, name: str) -> int:
        """Of the broker that runs now: one that died was started again."""
        for said in self._said(name):
            if said["event"] == "broker-restarted":
                self.servers[name].ready["broker_pid"] = said["broker_pid"]
        return int(self.servers[name].ready["broker_pid"])

    def _said(self, name: str) -> Iterator[dict[str, object]]:
        events = self.servers[name].events
        while not events.empty():
            yield events.get()

    def _wait_for_port(self, name: str) -> None:
        """Its broker ends with it, a moment later."""
        give_up_s = time.monotonic() + 10
        while time.monotonic() < give_up_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._ports[name])) != 0:
                    return
            time.sleep(0.02)
        raise LinkError(f"the broker of {name} does not end")

    # Devices

    def start_devices(self, job: Job, processes: int) -> None:
        """`job` for all devices together; brokers are named here."""
        job = msgspec.structs.replace(
            job,
            bundle=str(self.bundle),
            broker=f"{self.links['edge-a'].address},{self.links['edge-b'].address}",
            cloud=self.links["cloud"].address,
            outboxes=str(self.folder),
        )
        with suppress(Unavailable):
            self.devices_clock = self.false_clock()
        share = -(-job.devices // processes)
        for first in range(0, job.devices, share):
            mine = msgspec.structs.replace(job, devices=min(share, job.devices - first), first=first)
            false = self.devices_clock if first == 0 else None
            with environment(false.environment if false else {}):
                process = subprocess.Popen(
                    [sys.executable, "-m", "kinflow_bench.chaos_devices", msgspec.json.encode(mine).decode()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                )
            self._devices.append(process)
            reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            reader.start()
            self._readers.append(reader)

    def stop_devices(self) -> None:
        """Let each finish what it has begun."""
        for process in self._devices:
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        for process, reader in zip(self._devices, self._readers, strict=True):
            try:
                process.wait(LAST_ANSWERS_S)
            except subprocess.TimeoutExpired:
                children.stop(process)
            reader.join(10)
            if process.stdout is not None:
                process.stdout.close()
        self._devices.clear()
        self._readers.clear()

    def device_off_s(self, since_s: float) -> float:
        """By how much the wall clock of the first device was off at its last answer since then; 0 without one."""
        seen = [row for row in list(self.rows) if row.device == 0 and row.at_s >= since_s]
        return seen[-1].wall_s - time.time() if seen else 0.0

    def check_devices(self) -> None:
        """Raises LinkError when one of their processes has ended: nothing is done to those."""
        for process in self._devices:
            if process.poll() is not None:
                raise LinkError(f"a process of devices (pid {process.pid}) ended with status {process.returncode}")

    @property
    def device_pids(self) -> list[int]:
        return [process.pid for process in self._devices]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"{"):
                self.ended.append(msgspec.json.decode(line, type=Ended))
            else:
                self.rows.append(msgspec.json.decode(line, type=Row))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process is there, its connections too, and it does nothing. Raises Unavailable when it goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        if not _stops(pid):
            raise Unavailable(f"process {pid} does not stop")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _stops(pid: int) -> bool:
    give_up_s = time.monotonic() + 2
    while time.monotonic() < give_up_s:
        # After the name, which may hold anything, comes the state; T is stopped.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
