"""Across network namespaces: the link between device and edge server is cut, slowed down and made to lose packets."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from brokers import wait_until
from kinflow import idx
from kinflow.family import Family
from kinflow_bench.chaos import IMAGES
from kinflow_bench.chaos_devices import Ended, Job, Row
from kinflow_bench.chaos_expect import Expected, unsure_copy
from lan import Host, ip, three_hosts, why_not
from system_fixtures import FASHION, SAMPLES, running

pytestmark = pytest.mark.root

PORT = "1891"
DEADLINE_S = 1.0
# A machine that is busy with something else may not give an answer its processor in time.
LATE_MS = DEADLINE_S * 1e3 + 1000
HOLD_S = 2.0
DEVICES = 3


@pytest.fixture
def lan() -> Iterator[list[Host]]:
    """Device, edge and cloud."""
    if why_not_here := why_not():
        pytest.skip(why_not_here)
    with three_hosts() as hosts:
        yield hosts


@dataclass
class Devices:
    """A process of devices in a namespace, and what it said."""

    process: subprocess.Popen[bytes]
    rows: list[Row] = field(default_factory=list)
    ended: Ended | None = None

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(b"{"):
                self.ended = msgspec.json.decode(line, type=Ended)
            else:
                self.rows.append(msgspec.json.decode(line, type=Row))

    def used(self, since_s: float) -> bool:
        """Whether the edge server's broker has been reached since then."""
        return any(row.tier != "device" and row.at_s > since_s for row in list(self.rows))


@contextmanager
def devices(host: Host, job: Job) -> Iterator[Devices]:
    """They ask until the block ends; then each has finished what it had begun."""
    command = [*host.prefix, sys.executable, "-m", "kinflow_bench.chaos_devices", msgspec.json.encode(job).decode()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    found = Devices(process)
    reader = threading.Thread(target=found.read, daemon=True)
    reader.start()
    try:
        yield found
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
        reader.join(10)
    finally:
        process.kill()
        process.wait()


@contextmanager
def pulled_cable(host: Host) -> Iterator[None]:
    """No carrier: both sides know."""
    ip("-n", host.name, "link", "set", "eth0", "down")
    yield
    ip("-n", host.name, "link", "set", "eth0", "up")


@contextmanager
def slow(host: Host) -> Iterator[None]:
    """64 kbit/s of what this host sends, with a buffer that holds half a second."""
    tc = shutil.which("tc") or "/sbin/tc"
    rate = ["tbf", "rate", "64kbit", "burst", "4kb", "latency", "500ms"]
    in_host(host, tc, "qdisc", "add", "dev", "eth0", "root", *rate)
    yield
    in_host(host, tc, "qdisc", "del", "dev", "eth0", "root")


@contextmanager
def dropping(host: Host, what: str) -> Iterator[None]:
    """Packets that come in are dropped where nft's expression `what` holds, and nobody is told."""
    nft = shutil.which("nft") or "/usr/sbin/nft"
    rule = f"type filter hook input priority 0; {what} drop;"
    in_host(host, nft, f"table inet chaos {{\nchain input {{\n{rule}\n}}\n}}\n")  # nft asks for these line ends
    yield
    in_host(host, nft, "delete table inet chaos")


def in_host(host: Host, *command: str) -> None:
    subprocess.run([*host.prefix, *command], check=True, capture_output=True, timeout=20)


def test_every_inference_is_answered_while_the_link_fails(lan: list[Host], tmp_path: Path) -> None:
    """As many answers as inferences, each its member's own and in time; afterwards the servers are used again."""
    if shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("nft is not installed: apt install nftables")
    device, edge, cloud = lan
    images = idx.read(SAMPLES, axes=3)[:IMAGES]
    bundle = unsure_copy(FASHION / "bundle", tmp_path / "bundle", images)
    expected = Expected(Family.load(bundle), images)
    job = Job(
        str(SAMPLES),
        len(images),
        DEADLINE_S,
        DEVICES,
        interval_s=0.1,
        eventually=0.1,
        bundle=str(bundle),
        broker=f"{edge.address}:{PORT}",
        outboxes=str(tmp_path),
        insecure_lan=True,
    )
    faults: dict[str, Callable[[], object]] = {
        "cable": lambda: pulled_cable(edge),
        "slow": lambda: slow(device),
        "loss": lambda: dropping(device, "numgen random mod 100 < 20"),
        "silence": lambda: dropping(edge, ""),
    }
    shared = ("--port", PORT, "--insecure-lan", "--no-advertise", "--json")
    with ExitStack() as stack:
        upstream = ("--upstream", f"{cloud.address}:{PORT}")
        above = running("cloud", str(bundle), "--listen", cloud.address, *shared, prefix=cloud.prefix)
        stack.enter_context(above).ready()
        near = running("edge", str(bundle), "--listen", edge.address, *upstream, *shared, prefix=edge.prefix)
        stack.enter_context(near).ready()
        asking = stack.enter_context(devices(device, job))
        wait_until(lambda: {row.tier for row in asking.rows} == {"device", "edge", "cloud"}, 60)
        for name, fault in faults.items():
            begun_s = time.monotonic()
            with fault():  # type: ignore[attr-defined]
                time.sleep(HOLD_S)
            restored_s = time.monotonic()
            wait_until(lambda since_s=restored_s: asking.used(since_s), 30)
            during = [row for row in asking.rows if begun_s < row.at_s < restored_s]
            assert len(during) >= DEVICES, name
            if name in ("cable", "silence"):  # it did reach them
                assert any(row.degraded for row in during), name
    ended, rows = asking.ended, asking.rows
    assert ended is not None
    prompt = [row for row in rows if not row.eventually]
    assert len(prompt) == ended.started
    assert len(rows) - len(prompt) == ended.handed_in > 0
    assert ended.left == 0
    assert [row for row in rows if not expected.right(row.image, row.tier, row.codec, row.label, row.confidence)] == []
    assert [row for row in prompt if row.total_ms > LATE_MS] == []
    assert all(row.reason for row in rows if row.degraded)
