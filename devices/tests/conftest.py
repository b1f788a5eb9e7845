"""The emulated boards: parts fetched once into .cache/devices, a copy of the root per test run, the SDK installed."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import emulator
import pytest
from emulator import Board

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ROOT / "devices"
FAMILIES = sorted(path.parent for path in ROOT.glob("families/*/bundle/family.json"))
VENV = "/root/.local/share/kinflow/venv"
# pip need not compile under emulation: what it would write is compiled here.
QUICK = {"PIP_NO_COMPILE": "1"}


def spent_s() -> float:
    """Seconds of processor so far, of this process and of those that it has waited for."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Each test says what it cost: unlike its duration, that is the same on a busy machine."""
    before_s = spent_s()
    result = yield
    print(f"\n{item.nodeid}: {spent_s() - before_s:.0f} s of processor", file=sys.stderr)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """So does the whole."""
    terminalreporter.write_line(f"{spent_s():.0f} s of processor in all")


def why_not() -> str:
    """Why no board can be emulated here; empty when it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "emulated boards need root on Linux"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "emulated boards need Debian or Ubuntu: their root comes by apt"
    if not Path("/proc/sys/fs/binfmt_misc").exists():
        return "this kernel has no binfmt_misc"
    return ""


@dataclass(frozen=True)
class Parts:
    """What prepare.sh fetched."""

    root: Path
    qemu: Path
    wheels: Path


@pytest.fixture(scope="session")
def parts() -> Parts:
    if reason := why_not():
        pytest.skip(reason)
    cache = ROOT / ".cache/devices"
    done = subprocess.run(
        ["sh", str(DEVICES / "emulator/prepare.sh"), str(cache)],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Parts(cache / "root", cache / "qemu-aarch64", Path(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="session")
def qemu(parts: Parts) -> Iterator[Parts]:
    """aarch64 programs run on this machine meanwhile."""
    with emulator.registered(parts.qemu):
        yield parts


@pytest.fixture(scope="session")
def wheels(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cached wheels and one of this checkout's kinflow: what `install.sh --wheels` takes."""
    folder = tmp_path_factory.mktemp("wheels")
    for wheel in parts.wheels.iterdir():
        shutil.copy(wheel, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=600)
    return folder


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has cloned, as git sees it now: no environment, no cache."""
    folder = tmp_path_factory.mktemp("checkout") / "kinflow"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    compile_here(folder / "sdk")
    return folder


def install_on_this_machine(target: Path, wheels: Path, *wanted: str, compiled: bool = True) -> Path:
    """aarch64 wheels unpacked into a folder by this machine's pip: quick, and the same files. `compiled`: to be run."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31, 34, 35)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"),
            *("--no-index", "--find-links", str(wheels), "--only-binary=:all:", "--target", str(target)),
            *("--implementation", "cp", "--python-version", "3.11", "--abi", "cp311", "--abi", "abi3", "--abi", "none"),
            *("--platform=manylinux2014_aarch64", *platforms, *wanted),
        ],
        check=True,
        timeout=900,
    )
    if compiled:
        compile_here(target)
    return target


def compile_here(folder: Path) -> None:
    """Bytecode of the board's Python 3.11, where this machine has the same: minutes under emulation."""
    if sys.version_info[:2] == (3, 11):
        subprocess.run([sys.executable, "-m", "compileall", "-q", str(folder)], check=False, stdout=subprocess.DEVNULL)


@dataclass(frozen=True)
class Sdk:
    """What makes `import kinflow` work on a board without an install: for `binds` and `environment` of a command."""

    binds: dict[Path, str]
    environment: dict[str, str]


@pytest.fixture(scope="session")
def sdk(parts: Parts, wheels: Path, checkout: Path) -> Sdk:
    """Both runtimes and what the SDK's tests need, unpacked and compiled once; kinflow itself from the checkout."""
    target = parts.wheels.with_name(parts.wheels.name.replace("wheels-", "sdk-"))
    if not target.is_dir():
        part = Path(tempfile.mkdtemp(dir=target.parent))
        install_on_this_machine(part, wheels, "kinflow[onnx,tflite,cli]", "pytest", "pytest-timeout", "hypothesis")
        for each in part.glob("kinflow*"):
            shutil.rmtree(each)
        part.chmod(0o755)
        part.rename(target)
    # By that name hypothesis knows whose code it is; of all other modules it reads the source first.
    packages = "/sdk/site-packages"
    environment = {"PYTHONPATH": f"{packages}:/kinflow/sdk", "PYTHONDONTWRITEBYTECODE": "1"}
    return Sdk({target: packages, checkout: "/kinflow"}, environment)


@pytest.fixture(scope="session")
def pi(qemu: Parts, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A Raspberry Pi 4, as it comes from Debian: Python, no SDK."""
    return Board.make(tmp_path_factory.mktemp("pi") / "root", qemu.root, "pi4")
