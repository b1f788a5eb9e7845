"""What matters on a board: C library, heat and power, the camera, JetPack. Silent where there is nothing to say."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from kinflow.board import BoardState, read_state, tegrastats
from kinflow.cli.health import Check
from kinflow.errors import InputError, SettingsError
from kinflow.manifest import Preprocess
from kinflow.runtime import sources

# What the wheels of onnxruntime (2.28) and ai-edge-litert (2.27) are built for.
OLDEST_GLIBC = (2, 28)
# L4T's major release -> JetPack and its Python, by NVIDIA's release notes.
JETPACKS = {32: ("4", "3.6"), 34: ("5", "3.8"), 35: ("5", "3.8"), 36: ("6", "3.10"), 38: ("7", "3.12")}


def glibc() -> list[Check]:
    """The C library decides which wheels can be loaded at all."""
    name, version = platform.libc_ver()
    numbers = re.fullmatch(r"(\d+)\.(\d+).*", version)
    if name != "glibc" or numbers is None:
        advice = "use a system with glibc: the runtimes have no wheels for another C library"
        return [Check("glibc", "warn", f"the C library is {name or 'not glibc'} {version}".strip(), advice)]
    wanted = f"{OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]}"
    if (int(numbers[1]), int(numbers[2])) < OLDEST_GLIBC:
        return [Check("glibc", "fail", f"glibc {version}", f"the runtimes need {wanted}: install a newer system")]
    return [Check("glibc", "ok", f"glibc {version}")]


def board(state: BoardState | None = None) -> list[Check]:
    """Heat, throttling, power."""
    state = state or read_state()
    if state.kind == "other":
        return []
    parts = [state.model]
    parts += [] if state.temperature_c is None else [f"{state.temperature_c:.0f} °C of {state.limit_c:.0f}"]
    parts += [] if state.power_w is None else [f"{state.power_w:.1f} W"]
    parts += [] if state.battery is None else [f"battery {state.battery:.0%}"]
    checks = [Check("board", "ok", ", ".join(parts))]
    if state.temperature_c is not None and state.temperature_c >= state.limit_c:
        checks.append(Check("board", "warn", "it is hot and slows down", "give it a heat sink, a fan, or shade"))
    if state.throttled is not None:
        for what in dict.fromkeys((*state.throttled.now, *state.throttled.since_boot)):
            when = "now" if what in state.throttled.now else "since it was switched on"
            advice = "use the board's own power supply" if what == "undervoltage" else "cool it, and check its power"
            checks.append(Check("power", "warn", f"{what} {when}", advice))
    return checks


def camera(source: str) -> list[Check]:
    """Whether what `service.source` needs is there. Nothing is opened: a camera has one user at a time."""
    kind, _, where = source.partition(":")
    if kind not in ("v4l2", "stream", "jetson", "picamera2"):
        return []
    any_size = Preprocess("RGB", 224, 224, [0.0] * 3, [1.0] * 3, "crop")
    try:
        opened = sources.parse(source, any_size)
    except SettingsError as exc:
        return [Check("camera", "fail", str(exc).splitlines()[0], "correct `source` in the settings")]
    if isinstance(opened, sources.CommandSource):
        program = opened.pipeline.command[0]
        if shutil.which(program) is None:
            return [Check("camera", "fail", f"{program} is not installed", opened.pipeline.install)]
    elif find_spec("picamera2") is None:
        return [Check("camera", "fail", "picamera2 is not there", "apt install python3-picamera2")]
    if kind == "v4l2":
        return [_video_device(Path(where or "/dev/video0"))]
    return [Check("camera", "ok", f"what {source} needs is installed; whether frames come was not tried")]


def _video_device(path: Path) -> Check:
    if not path.exists():
        others = ", ".join(sorted(str(each) for each in Path("/dev").glob("video*"))) or "none"
        return Check("camera", "fail", f"{path} is not there; there are: {others}", "plug the camera in, or name it")
    if not os.access(path, os.R_OK | os.W_OK):
        return Check("camera", "fail", f"{path} may not be read", "sudo usermod -aG video $USER, then log in again")
    return Check("camera", "ok", f"{path} is there; whether frames come was not tried")


def jetpack(root: Path = Path("/")) -> list[Check]:
    """The release of NVIDIA's system, and whether its Python is new enough."""
    try:
        text = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    release = re.search(r"R(\d+) \(release\), REVISION: (\S+?),?(?:\s|$)", text)
    if release is None:
        return [Check("jetpack", "warn", f"unknown release: {text.strip()[:40]!r}", "kinflow was made for JetPack 6")]
    found = f"L4T {release[1]}.{release[2]}"
    version, python = JETPACKS.get(int(release[1]), ("", ""))
    if not version:
        return [Check("jetpack", "warn", f"{found}, of an unknown JetPack", "kinflow was made for JetPack 6")]
    found += f", JetPack {version} with Python {python}"
    if tuple(map(int, python.split("."))) < (3, 10):
        return [Check("jetpack", "fail", found, "install JetPack 6, or run kinflow in a container with Python 3.10")]
    return [Check("jetpack", "ok", found), *_tegrastats()]


def _tegrastats() -> list[Check]:
    """One line of it."""
    program = shutil.which("tegrastats")
    if program is None:
        return []
    try:
        with subprocess.Popen([program, "--interval", "500"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                said = tegrastats.parse(process.stdout.readline())
            finally:
                process.terminate()
    except (OSError, InputError) as exc:
        return [Check("tegrastats", "warn", str(exc), "only this check needs it")]
    power = ", ".join(f"{rail} {milli_w} mW" for rail, milli_w in said.power_mw.items())
    return [Check("tegrastats", "ok", f"RAM {said.ram_used_mb} of {said.ram_total_mb} MB; {power or 'no power rails'}")]
