"""`bench chaos`: faults done to real processes while devices ask without pause, and what came of every inference.

An inference is answered once or it is lost; an answer is right when the member of its tier, run apart on the same
image, says the same; it is late 50 ms after its deadline.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinflow import idx
from kinflow.errors import LinkError
from kinflow.family import Family
from kinflow.forwarder import WAITED
from kinflow_bench.chaos_clock import Unavailable
from kinflow_bench.chaos_devices import Job, Row
from kinflow_bench.chaos_expect import Expected, unsure_copy
from kinflow_bench.chaos_faults import ALL
from kinflow_bench.chaos_site import SERVERS, Site, resident_mb

GRACE_MS = 50.0
RECOVERY_TIMEOUT_S = 30.0
# Twenty devices import much on a busy machine.
START_S = 300.0
IMAGES = 300


@dataclass(frozen=True)
class Plan:
    """How much chaos."""

    faults: Sequence[str]
    inferences: int
    devices: int
    processes: int
    deadline_s: float = 1.0
    hold_s: float = 2.0
    """How long a fault lasts, besides the restarts in it."""
    rest_s: float = 1.0
    """Between two faults."""
    interval_s: float = 0.3
    """Between two inferences of one device."""
    eventually: float = 0.05
    """Share of the images that are not asked about but handed in, for an answer some day."""


def full(faults: int, inferences: int, devices: int, seed: int) -> Plan:
    """Every fault as often as it takes, in an order drawn by `seed`."""
    names = [name for _ in range(-(-faults // len(ALL))) for name in ALL]
    random.Random(seed).shuffle(names)
    return Plan(names, inferences, devices, processes=min(4, devices))


SHORT = Plan(
    (
        "freeze_edge",
        "freeze_edge_broker",
        "half_open",
        "kill_cloud_broker",
        "jitter",
        "duplicate_replies",
        "clock_jumps",
        "device_clocks_jump",
        "kill_everything",
    ),
    inferences=800,
    devices=6,
    processes=2,
    hold_s=1.0,
    rest_s=0.5,
    interval_s=0.15,
)
"""What continuous integration runs, in less than a minute: faults that differ much and cost few starts of a server."""


def run(family: Path, images: Path, plan: Plan, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Do it; `tell` gets a line per fault. Raises LinkError when servers do not start."""
    pixels = idx.read(images, axes=3)[:IMAGES]
    with tempfile.TemporaryDirectory(prefix="kinflow-chaos-") as name:
        folder = Path(name)
        bundle = unsure_copy(family, folder / "bundle", pixels)
        expected = Expected(Family.load(bundle), pixels)
        with Site(bundle, folder) as site:
            job = Job(str(images), len(pixels), plan.deadline_s, plan.devices, plan.interval_s, plan.eventually)
            site.start_devices(job, plan.processes)
            _wait(site, lambda: len({row.device for row in site.rows}) == plan.devices, START_S, "devices that answer")
            _wait(site, lambda: all(_used(site, server, 0.0) for server in SERVERS[:2]), START_S, "offloads to both")
            time.sleep(3)
            memory = {"devices": [resident_mb(pid) for pid in site.device_pids]}
            faults: list[dict[str, Any]] = []
            try:
                for fault in plan.faults:
                    site.check_devices()
                    faults.append(_fault(site, fault, plan, tell))
                _wait(site, lambda: len(_prompt(site.rows)) >= plan.inferences, 3600, "inferences")
            except KeyboardInterrupt:
                tell("stopped early: what was done so far is summed up")
            memory["devices_after"] = [resident_mb(pid) for pid in site.device_pids]
            site.stop_devices()
        return _summary(plan, site, faults, memory, expected)


def _fault(site: Site, name: str, plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    begin_s = time.monotonic()
    try:
        server = ALL[name](site, plan.hold_s)
    except Unavailable as exc:
        tell(f"{name}: left out, {exc}")
        return {"fault": name, "left_out": str(exc)}
    end_s = time.monotonic()
    recovery_s = None
    while recovery_s is None and time.monotonic() < end_s + RECOVERY_TIMEOUT_S:
        used = _used(site, server, end_s)
        recovery_s = used[0].at_s - end_s if used else None
        time.sleep(0.02)
    time.sleep(plan.rest_s)
    during = [row for row in _prompt(site.rows) if begin_s <= row.at_s <= time.monotonic()]
    degraded = sum(row.degraded for row in during)
    shown = "never" if recovery_s is None else f"{recovery_s:.1f} s"
    tell(f"{name}: {len(during)} inferences, {degraded} degraded, {server} used again after {shown}")
    return {
        "fault": name,
        "what": ALL[name].__doc__,
        "lasted_s": round(end_s - begin_s, 2),
        "inferences": len(during),
        "degraded": degraded,
        "reasons": Counter(_kind(row.reason) for row in during if row.degraded),
        "tiers": dict(Counter(row.tier for row in during)),
        "recovery_s": None if recovery_s is None else round(recovery_s, 2),
    }


def _prompt(rows: Sequence[Row]) -> list[Row]:
    """Those that were waited for."""
    return [row for row in list(rows) if not row.eventually]


def _used(site: Site, server: str, since_s: float) -> list[Row]:
    """Answers since then from that server; the cloud's also by way of an edge server."""
    if server == "cloud":
        return [row for row in list(site.rows) if row.at_s > since_s and row.tier == "cloud"]
    node = site.node(server)
    return [row for row in list(site.rows) if row.at_s > since_s and row.node == node]


def _summary(
    plan: Plan, site: Site, faults: list[dict[str, Any]], memory: dict[str, list[float]], expected: Expected
) -> dict[str, Any]:
    rows = _prompt(site.rows)
    done = [fault for fault in faults if "left_out" not in fault]
    recoveries = [fault["recovery_s"] for fault in done]
    wrong = [row for row in site.rows if not expected.right(row.image, row.tier, row.codec, row.label, row.confidence)]
    late = [row.total_ms for row in rows if row.total_ms > plan.deadline_s * 1e3 + GRACE_MS]
    total = sorted(row.total_ms for row in rows)
    return {
        "inferences": sum(ended.started for ended in site.ended),
        "answered": len(rows),
        "wrong": len(wrong),
        "late": len(late),
        "degraded": sum(row.degraded for row in rows),
        "unexplained": sum(row.degraded and not row.reason for row in rows),
        "eventually": _eventually(site),
        "faults": len(done),
        "recovery_s": {
            "median": statistics.median([found for found in recoveries if found is not None] or [0.0]),
            "max": max([found for found in recoveries if found is not None] or [0.0]),
            "never": recoveries.count(None),
        },
        "devices": plan.devices,
        "deadline_ms": plan.deadline_s * 1e3,
        "total_ms": {"median": total[len(total) // 2], "p99": total[int(len(total) * 0.99)], "max": total[-1]},
        "tiers": dict(Counter(row.tier for row in rows)),
        "reasons": dict(Counter(_kind(row.reason) for row in rows if row.degraded).most_common()),
        "wrong_examples": [str(row) for row in wrong[:5]],
        "device_memory_mb": memory,
        "by_fault": _by_fault(done),
        "left_out": [fault for fault in faults if "left_out" in fault],
    }


def _eventually(site: Site) -> dict[str, int]:
    """What was handed in, and what came of it: each is answered once, and leaves nothing behind."""
    rows = [row for row in site.rows if row.eventually]
    return {
        "handed_in": sum(ended.handed_in for ended in site.ended),
        "answered": len(rows),
        "after_waiting": sum(row.reason == WAITED for row in rows),
        "degraded": sum(row.degraded for row in rows),
        "left": sum(ended.left for ended in site.ended),
    }


def _by_fault(faults: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of each fault put together."""
    table: dict[str, Any] = {}
    for name in dict.fromkeys(fault["fault"] for fault in faults):
        runs = [fault for fault in faults if fault["fault"] == name]
        table[name] = {
            "what": runs[0]["what"],
            "runs": len(runs),
            "inferences": sum(run["inferences"] for run in runs),
            "degraded": sum(run["degraded"] for run in runs),
            "reasons": dict(sum((run["reasons"] for run in runs), Counter())),
            "recovery_s": [run["recovery_s"] for run in runs],
        }
    return table


def _kind(reason: str) -> str:
    """A reason without the names and numbers in it."""
    code, colon, _ = reason.partition(":")
    if colon and code.isalpha():
        return code
    return "".join("#" if sign.isdigit() else sign for sign in reason)[:60]


def _wait(site: Site, condition: Callable[[], object], timeout_s: float, what: str) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        site.check_devices()
        if time.monotonic() > give_up_s:
            raise LinkError(f"no {what} within {timeout_s:.0f} s")
        time.sleep(0.05)
