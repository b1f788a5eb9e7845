"""Python, memory, disk, clock, processor and installed packages."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kinflow.cli.health import Check

OLDEST, NEWEST = (3, 10), (3, 13)
MEMORY_WARN_MB, MEMORY_FAIL_MB = 256, 96
DISK_WARN_MB = 200
FIRST_SANE_YEAR = 2026
IMPORT_TIMEOUT_S = 90.0
# Instruction sets that decide which kernels the runtimes take, and which wheels start at all.
CPU_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"),
    *("neon", "vfpv4", "asimd", "atomics", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
# distribution -> code that makes the package execute its compiled parts
PROBES = {
    "numpy": "import numpy; a = numpy.ones((8, 8), 'f4'); assert (a @ a)[0, 0] == 8",
    "msgspec": "import msgspec; msgspec.msgpack.decode(msgspec.msgpack.encode([1]))",
    "zeroconf": "import zeroconf; zeroconf.DNSOutgoing(0).packets()",
    "onnxruntime": "import onnxruntime; onnxruntime.get_available_providers()",
    "ai-edge-litert": "from ai_edge_litert.interpreter import Interpreter",
    "tflite-runtime": "from tflite_runtime.interpreter import Interpreter",
}
RUNTIMES = ("onnxruntime", "ai-edge-litert", "tflite-runtime")
_TIME_ERROR = 5


def python() -> list[Check]:
    """Version and word size."""
    found = f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}"
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        supported = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        return [Check("python", "fail", found, f"use Python {supported}")]
    if struct.calcsize("P") < 8:
        advice = "install a 64-bit system: the runtimes have no 32-bit wheels"
        return [Check("python", "warn", f"{found}, 32-bit", advice)]
    return [Check("python", "ok", found)]


def memory() -> list[Check]:
    """What the kernel says can still be had."""
    available = _meminfo_mb("MemAvailable")
    if available is None:
        return [Check("memory", "warn", "/proc/meminfo does not tell", "nothing, if this is not Linux")]
    found = f"{available} MB available of {_meminfo_mb('MemTotal')} MB"
    if available < MEMORY_FAIL_MB:
        return [Check("memory", "fail", found, f"free some: a device needs about {MEMORY_FAIL_MB} MB")]
    if available < MEMORY_WARN_MB:
        return [Check("memory", "warn", found, f"close something: below {MEMORY_WARN_MB} MB a runtime may not fit")]
    return [Check("memory", "ok", found)]


def disk() -> list[Check]:
    """Room where packages and temporary files go."""
    checks = []
    for folder in dict.fromkeys((sys.prefix, tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free // 1_000_000
        found = f"{free} MB free at {folder}"
        if free < DISK_WARN_MB:
            checks.append(Check("disk", "warn", found, f"make room: updates need about {DISK_WARN_MB} MB"))
        else:
            checks.append(Check("disk", "ok", found))
    return checks


def clock() -> list[Check]:
    """Deadlines use the monotonic clock; logs and certificates need the right date."""
    before = time.monotonic()
    time.sleep(0.01)
    if not before < time.monotonic() < before + 5:
        return [
            Check(
                "clock",
                "fail",
                "the monotonic clock does not run",
                "deadlines cannot work: check the machine",
            )
        ]
    now = datetime.now(timezone.utc)
    found = f"{now:%Y-%m-%d %H:%M} UTC"
    advice = "set it: timedatectl set-ntp true"
    if now.year < FIRST_SANE_YEAR:
        return [Check("clock", "fail", f"{found} is in the past", advice)]
    synchronised = _clock_synchronised()
    if synchronised is None:
        return [Check("clock", "ok", f"{found}, synchronisation unknown")]
    if not synchronised:
        return [
            Check(
                "clock",
                "warn",
                f"{found}, not synchronised",
                f"{advice} (only logs and certificates need it)",
            )
        ]
    return [Check("clock", "ok", f"{found}, synchronised")]


def processor() -> list[Check]:
    """Cores and instruction sets."""
    flags = _cpu_flags()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = [flag for flag in CPU_FLAGS if flag in flags]
    found = f"{usable} cores, {' '.join(known) or 'no known instruction set listed'}"
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx" not in flags:
        return [Check("cpu", "warn", found, "without AVX some wheels stop with SIGILL: see the packages below")]
    return [Check("cpu", "ok", found)]


def packages() -> list[Check]:
    """Each compiled package in a process of its own: a wheel built for a newer processor dies with SIGILL."""
    installed = {name: _version(name) for name in PROBES if _version(name) is not None}
    checks = [_probe(name, str(number)) for name, number in installed.items()]
    if not any(name in installed for name in RUNTIMES):
        advice = "pip install 'kinflow[onnx]' or 'kinflow[tflite]'"
        checks.append(Check("packages", "fail", "no runtime is installed", advice))
    if "tflite-runtime" in installed and not str(installed.get("numpy")).startswith("1."):
        found = f"tflite-runtime needs numpy 1, this is {installed.get('numpy')}"
        checks.append(
            Check(
                "packages",
                "warn",
                found,
                "pip install 'kinflow[tflite-runtime]' in an environment of its own",
            )
        )
    return checks


def _probe(name: str, number: str) -> Check:
    title = f"{name} {number}"
    start = time.monotonic()
    command = [sys.executable, "-c", PROBES[name]]
    try:
        done = subprocess.run(command, capture_output=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        advice = "is the machine out of memory?"
        return Check("packages", "fail", f"{title} does not load within {IMPORT_TIMEOUT_S:.0f} s", advice)
    return judge_probe(title, name, done.returncode, done.stderr.decode(errors="replace"), time.monotonic() - start)


def judge_probe(title: str, name: str, returncode: int, errors: str, seconds: float) -> Check:
    """What the end of a probing process means. A negative status is the signal that ended it."""
    if returncode == -signal.SIGILL:
        found = f"{title} stops with SIGILL: its wheel uses instructions that this processor lacks"
        advice = f"install an older one: pip install '{name}<{title.rpartition(' ')[2]}'"
        return Check("packages", "fail", found, advice)
    if returncode < 0:
        return Check("packages", "fail", f"{title} stops with {_signal_name(-returncode)}", f"reinstall {name}")
    if returncode > 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return Check("packages", "fail", f"{title} does not load: {last}", f"pip install --force-reinstall {name}")
    return Check("packages", "ok", f"{title} loads in {seconds:.1f} s")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _version(distribution: str) -> str | None:
    if find_spec(distribution.replace("-", "_")) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _meminfo_mb(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024 // 1_000_000
    return None


def _cpu_flags() -> frozenset[str]:
    """`flags` on x86, `Features` on ARM; of the first processor that lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, rest = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(rest.split())
    return frozenset()


def _clock_synchronised() -> bool | None:
    """The kernel's own word: adjtimex(2) returns TIME_ERROR while the clock is not synchronised."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    # struct timex, all zero: modes = 0 asks and changes nothing. It has 208 bytes on 64-bit Linux.
    state = adjtimex(ctypes.create_string_buffer(512))
    return None if state < 0 else state != _TIME_ERROR
