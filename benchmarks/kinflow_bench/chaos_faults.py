"""What can go wrong, done on purpose: each fault does it, holds it for a while, and undoes it.

A fault returns the server that must be used again afterwards; recovery is the time from then until an answer comes
from there.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import kinflow_bench.chaos_expect as expect
from kinflow import topics
from kinflow.address import BrokerAddress
from kinflow.frame import Buffer
from kinflow.mqtt import Connection
from kinflow_bench.chaos_clock import Unavailable, check_off, check_preloaded, environment, server_off_s
from kinflow_bench.chaos_site import Site, stopped
from kinflow_bench.shaping import CLEAR, Shape

Fault = Callable[[Site, float], str]
DAY_S = 86400
DAYS = (3, -1)


def kill_edge(site: Site, hold_s: float) -> str:
    """kill -9 of an edge server in the middle of requests; its broker dies with it"""
    site.kill("edge-a")
    time.sleep(hold_s)
    site.start("edge-a")
    return "edge-a"


def kill_edge_broker(site: Site, hold_s: float) -> str:
    """kill -9 of an edge server's broker, twice; the server starts it again"""
    for _ in range(2):
        with suppress(ProcessLookupError):
            os.kill(site.broker_pid("edge-a"), 9)
        time.sleep(hold_s / 2)
    return "edge-a"


def kill_cloud(site: Site, hold_s: float) -> str:
    """kill -9 of the cloud server and its broker"""
    site.kill("cloud")
    time.sleep(hold_s)
    site.start("cloud")
    return "cloud"


def kill_cloud_broker(site: Site, hold_s: float) -> str:
    """kill -9 of the cloud's broker"""
    os.kill(site.broker_pid("cloud"), 9)
    time.sleep(hold_s)
    return "cloud"


def kill_both_edges(site: Site, hold_s: float) -> str:
    """kill -9 of both edge servers: only the cloud is left"""
    for name in ("edge-a", "edge-b"):
        site.kill(name)
    time.sleep(hold_s)
    site.start_together("edge-b", "edge-a")
    return "edge-a"


def kill_everything(site: Site, hold_s: float) -> str:
    """kill -9 of all servers: devices are alone"""
    for name in ("edge-a", "edge-b", "cloud"):
        site.kill(name)
    time.sleep(hold_s)
    site.start_together("cloud", "edge-b", "edge-a")
    return "edge-a"


def rolling_restart(site: Site, _hold_s: float) -> str:
    """SIGTERM to one edge server after the other, each started again"""
    for name in ("edge-b", "edge-a"):
        site.stop(name)
        site.start(name)
    return "edge-a"


def freeze_edge(site: Site, hold_s: float) -> str:
    """an edge server hangs: connected and mute (SIGSTOP)"""
    with stopped(site.servers["edge-a"].pid):
        time.sleep(hold_s)
    return "edge-a"


def freeze_edge_broker(site: Site, hold_s: float) -> str:
    """a broker hangs: it accepts connections and never answers (SIGSTOP)"""
    with stopped(site.broker_pid("edge-a")):
        time.sleep(hold_s)
    return "edge-a"


def freeze_cloud(site: Site, hold_s: float) -> str:
    """the cloud server hangs"""
    with stopped(site.servers["cloud"].pid):
        time.sleep(hold_s)
    return "cloud"


def half_open(site: Site, hold_s: float) -> str:
    """every connection to an edge server goes silent for good without being closed; new ones pass"""
    site.links["edge-a"].leave_half_open()
    time.sleep(hold_s)
    return "edge-a"


def silent_link(site: Site, hold_s: float) -> str:
    """a link accepts connections and passes nothing on"""
    return _shaped(site, hold_s, "edge-a", Shape(silent=True))


def cut_links(site: Site, hold_s: float) -> str:
    """every connection is reset, again and again"""
    for _ in range(3):
        for link in site.links.values():
            link.cut()
        time.sleep(hold_s / 3)
    return "edge-a"


def jitter(site: Site, hold_s: float) -> str:
    """200 ms of jitter on the way to both edge servers"""
    site.links["edge-b"].shape = Shape(jitter_s=0.2)
    try:
        return _shaped(site, hold_s, "edge-a", Shape(jitter_s=0.2))
    finally:
        site.links["edge-b"].shape = CLEAR


def slow_links(site: Site, hold_s: float) -> str:
    """64 kbit/s to both edge servers"""
    site.links["edge-b"].shape = Shape(bytes_per_s=8000)
    try:
        return _shaped(site, hold_s, "edge-a", Shape(bytes_per_s=8000))
    finally:
        site.links["edge-b"].shape = CLEAR


def lossy_link(site: Site, hold_s: float) -> str:
    """a tenth of all packets comes 300 ms late, as TCP shows loss"""
    return _shaped(site, hold_s, "edge-a", Shape(loss=0.1))


def slow_upstream(site: Site, hold_s: float) -> str:
    """300 ms between the edge servers and the cloud"""
    return _shaped(site, hold_s, "up", Shape(delay_s=0.15)) and "cloud"


def duplicate_replies(site: Site, hold_s: float) -> str:
    """every reply of an edge server comes three times and out of order"""
    address = BrokerAddress.parse(site.servers["edge-a"].broker)
    seen: set[bytes] = set()

    def again(topic: str, view: Buffer) -> None:
        data = bytes(view)
        if data not in seen:
            seen.add(data)
            for _ in range(2):
                echoer.call_at(time.monotonic() + random.uniform(0, 0.1), lambda: echoer.publish(topic, data))

    echoer = Connection(address, "chaos-echo", on_message=again, subscriptions=[topics.reply("#")])
    with echoer:
        time.sleep(hold_s)
    return "edge-a"


def other_version(site: Site, hold_s: float) -> str:
    """a server with another family version appears at an edge server's broker"""
    folder = site.folder / f"other-{time.monotonic_ns()}"
    shutil.copytree(site.bundle, folder)
    expect.set_version(folder, "9.9.9")
    broker = site.servers["edge-a"].broker
    with site.beside("edge", [folder], "--broker", broker, "--no-advertise"):
        time.sleep(hold_s)
    return "edge-a"


def clock_jumps(site: Site, hold_s: float) -> str:
    """an edge server's and its broker's clock jumps three days ahead and a day back"""
    clock = site.false_clock()
    site.stop("edge-a")
    with environment(clock.environment):
        site.start("edge-a")
    try:
        for days in DAYS:
            clock.jump(days * DAY_S)
            check_off(server_off_s(site.servers["edge-a"]), days * DAY_S, "the edge server")
            check_preloaded(clock, site.broker_pid("edge-a"), "the broker")
            time.sleep(hold_s / 2)
    finally:
        site.stop("edge-a")
        clock.jump(0)
        site.start("edge-a")
    return "edge-a"


def device_clocks_jump(site: Site, hold_s: float) -> str:
    """the clock of a quarter of the devices jumps three days ahead and a day back"""
    clock = site.devices_clock
    if clock is None:
        raise Unavailable("a false clock needs a C compiler, cc")
    try:
        for days in DAYS:
            clock.jump(days * DAY_S)
            begin_s = time.monotonic()
            time.sleep(hold_s / 2)
            check_off(site.device_off_s(begin_s), days * DAY_S, "the devices")
    finally:
        clock.jump(0)
    return "edge-a"


def full_disk(site: Site, hold_s: float) -> str:
    """an edge server's and its broker's disk is full"""
    if os.geteuid() != 0:
        raise Unavailable("a small disk needs root")
    disk = site.folder / "disk"
    disk.mkdir(exist_ok=True)
    site.stop("edge-a")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=777", "tmpfs", str(disk)], check=True)
    try:
        with environment({"TMPDIR": str(disk)}):
            site.start("edge-a")
        with suppress(OSError):
            (disk / "fill").write_bytes(bytes(1_000_000))
        time.sleep(hold_s)
        site.stop("edge-a")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    site.start("edge-a")
    return "edge-a"


def _shaped(site: Site, hold_s: float, name: str, shape: Shape) -> str:
    site.links[name].shape = shape
    try:
        time.sleep(hold_s)
    finally:
        site.links[name].shape = CLEAR
    return name


ALL: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_edge,
        kill_edge_broker,
        kill_cloud,
        kill_cloud_broker,
        kill_both_edges,
        kill_everything,
        rolling_restart,
        freeze_edge,
        freeze_edge_broker,
        freeze_cloud,
        half_open,
        silent_link,
        cut_links,
        jitter,
        slow_links,
        lossy_link,
        slow_upstream,
        duplicate_replies,
        other_version,
        clock_jumps,
        device_clocks_jump,
        full_disk,
    )
}
