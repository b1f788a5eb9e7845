"""What `kinflow doctor` says of a healthy machine and of sick ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kinflow.advert import local_networks
from kinflow.cli import health_inference, health_machine, health_network
from kinflow.cli.health import Check, guarded
from kinflow.settings import DeviceSettings, TlsSettings

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "families/fashion/bundle"


def doctor(*words: str, cwd: Path = ROOT) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "kinflow", "doctor", "--json", "--interface", "127.0.0.1", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=200, check=False)
    return done.returncode, json.loads(done.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_healthy_machine_passes() -> None:
    """Every area is covered, a real inference ran, and what is not ok says what to do."""
    status, report = doctor()
    assert status == 0, report
    assert report["ok"] is True
    areas = {check["name"]: check for check in report["checks"]}
    assert areas.keys() == {
        *("python", "memory", "disk", "clock", "cpu", "glibc", "packages"),
        *("interfaces", "multicast", "certificate", "broker", "inference", "offload"),
    }
    assert areas["inference"]["status"] == "ok"
    assert areas["multicast"]["status"] == "ok"
    assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")


def test_failures_are_counted_in_the_exit_status(tmp_path: Path) -> None:
    """A broken bundle and a broker that is not there: both named, status 1, the rest still checked."""
    (tmp_path / "bundle").mkdir()
    broker = f"127.0.0.1:{free_port()}"
    status, report = doctor("--bundle", str(tmp_path / "bundle"), "--broker", broker)
    assert status == 1
    assert report["ok"] is False
    failed = {check["name"]: check for check in report["checks"] if check["status"] == "fail"}
    assert failed.keys() == {"broker", "inference"}
    assert broker in failed["broker"]["found"]
    assert "family.json" in failed["inference"]["found"]


def test_the_lines_are_readable() -> None:
    """Without --json: one line per check, status first, and a last line with the sum."""
    command = [sys.executable, "-m", "kinflow", "doctor", "--interface", "127.0.0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    *lines, last = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    assert last.startswith(f"{len(lines)} checks: 0 failed")


@pytest.mark.parametrize(
    ("code", "status", "what"),
    [
        ("pass", "ok", "loads in"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})", "fail", "SIGILL"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "fail", "SIGSEGV"),
        ("import a_module_that_is_not_there", "fail", "ModuleNotFoundError"),
    ],
)
def test_a_dying_import_is_told_apart(code: str, status: str, what: str) -> None:
    """Real processes end in each way; an illegal instruction is named as what it is."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    check = health_machine.judge_probe("numpy 9.9", "numpy", done.returncode, done.stderr, 0.1)
    assert check.status == status
    assert what in check.found
    assert (check.advice == "") == (status == "ok")


def test_a_check_that_breaks_is_a_failed_check() -> None:
    """The other checks must still run."""

    def broken() -> list[Check]:
        raise RuntimeError("no such sensor")

    (check,) = guarded("sensor", broken)
    assert (check.name, check.status) == ("sensor", "fail")
    assert "no such sensor" in check.found


def test_an_address_that_is_not_there_is_named() -> None:
    """A wrong `interfaces` key is the most likely reason that nothing is found."""
    (check,) = health_network.interfaces(["203.0.113.7"])
    assert check.status == "fail"
    assert "203.0.113.7" in check.found
    (check,) = health_network.multicast(["203.0.113.7"])
    assert check.status == "fail"


def test_every_address_of_this_machine_is_listed() -> None:
    """As many as the system has, loopback included."""
    (check,) = health_network.interfaces([])
    assert all(address in check.found for address in local_networks())


def test_a_port_that_accepts_but_does_not_speak_mqtt_fails() -> None:
    """TCP alone is no broker."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        checks = health_network.broker(f"127.0.0.1:{deaf.getsockname()[1]}", TlsSettings())
    assert checks[-1].status == "fail"
    assert "no MQTT connection" in checks[-1].found


def test_the_default_bundle_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's machine needs none: a warning, not a failure, and no offload is tried."""
    monkeypatch.chdir(tmp_path)
    (check,) = health_inference.local(None, DeviceSettings())
    assert check.status == "warn"
    assert "--bundle" in check.found
    assert health_inference.offloaded(None, DeviceSettings()) == []


def test_memory_and_flags_are_read_from_the_kernel() -> None:
    """The figures are this machine's."""
    (check,) = health_machine.memory()
    total_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
    assert f"of {total_mb}" in check.found or str(total_mb)[:3] in check.found
    (check,) = health_machine.processor()
    assert str(len(os.sched_getaffinity(0))) in check.found
