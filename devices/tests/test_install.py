"""A user's way on an emulated board: every line of its README, one after the other, from the install to the removal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulator import Board
from PIL import Image
from readme import Line, lines

import kinflow.idx
from conftest import QUICK, ROOT, VENV, Parts, compile_here, spent_s

PHOTOS = 2
FACES = {"raspberrypi": "pi4", "jetson": "jetson-orin"}
SERVICE = "/opt/kinflow"
# `kinflow tune` runs a family of photographs some seventy times: ten minutes of an emulated processor. A small one, not
# the boards' own, stands for it.
STAND_IN = ("imagenet_lite", "digits_nested")


@pytest.fixture(scope="module")
def binds(checkout: Path, wheels: Path) -> dict[Path, str]:
    """The user's folder with the project, with frames for a board without a camera, and the wheels."""
    folder = checkout / "photos"
    folder.mkdir()
    for index, image in enumerate(kinflow.idx.read(ROOT / "families/fashion/samples/images-idx3-ubyte.gz")[:PHOTOS]):
        Image.fromarray(image).save(folder / f"{index}.png")
    return {checkout: "/kinflow", wheels: "/wheels"}


@dataclass(frozen=True)
class User:
    """Who types, in the checkout, after logging in. Root, so that `sudo` is a name for nothing."""

    board: Board
    binds: dict[Path, str]

    def types(self, line: str) -> tuple[int, str]:
        """(status, what was said). Wheels and loopback stand in for the network, a small family for the large one."""
        line = line.replace(*STAND_IN)
        if line.startswith("kinflow doctor"):
            line += " --interface 127.0.0.1"
        if "install.sh" in line and "--uninstall" not in line:
            if "--service" in line:
                self._copy_environment(SERVICE + "/venv")
            line += " --wheels /wheels"
        typed = f'cd /kinflow && sudo() {{ "$@"; }} && PATH=$HOME/.local/bin:$PATH && {line}'
        command = self.board.command("sh", "-c", typed, binds=self.binds, environment=QUICK)
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        return done.returncode, done.stdout + done.stderr

    def _copy_environment(self, where: str) -> None:
        """The user's environment, as if this install had been interrupted behind pip, which is slow when emulated."""
        source, target = (self.board.root / path.strip("/") for path in (VENV, where))
        shutil.copytree(source, target, symlinks=True)
        for script in (target / "bin").iterdir():
            if not script.is_symlink():
                script.write_bytes(script.read_bytes().replace(VENV.encode(), where.encode()))


def files_of(board: Board) -> set[Path]:
    """Everything on the board, but what every program leaves there."""
    return {
        path.relative_to(board.root)
        for path in board.root.rglob("*")
        if not {"proc", "dev", "__pycache__", "tmp"} & set(path.relative_to(board.root).parts)
    }


def installs(user: User, said: str) -> None:
    """An environment, settings of this board, the fastest backend."""
    assert "chosen: " in said
    compile_here(user.board.root / VENV.strip("/") / "lib")
    home = user.board.root / "root"
    assert 'tuned = "/root/.local/share/kinflow/tuned.toml"' in (home / ".config/kinflow/device.toml").read_text()
    tuned = (home / ".local/share/kinflow/tuned.toml").read_text()
    assert re.search(r'^board = "(Raspberry Pi 4 Model B Rev 1.4|NVIDIA Jetson Orin .*)"$', tuned, re.MULTILINE)
    assert re.search(r'^backend = "(onnx|tflite)"$', tuned, re.MULTILINE)


def installs_another_family(user: User, said: str) -> None:
    """The settings that were there name it now, and the first one is gone; then back to that."""
    home = user.board.root / "root"
    for family in (STAND_IN[1], "fashion"):
        assert "chosen: " in said
        assert [path.name for path in (home / ".local/share/kinflow/families").iterdir()] == [family]
        settings = (home / ".config/kinflow/device.toml").read_text()
        assert f'bundle = "/root/.local/share/kinflow/families/{family}"' in settings
        if family != "fashion":
            status, said = user.types("sh devices/install.sh raspberrypi --family fashion")
            assert status == 0, said


def examines(_: User, said: str) -> None:
    """Model, heat, packages by the name of this board; the only failure is the camera that is not there."""
    checks = re.findall(r"^(ok|warn|fail) +(\S+) +(.*)$", said, re.MULTILINE)
    assert f"{len(checks)} checks: 1 failed" in said
    found = {name: text for _, name, text in checks}
    assert re.search(r"Raspberry Pi 4 Model B Rev 1.4, 48 °C of 80|Jetson Orin .*, 50 °C of 99", found["board"])
    assert ("jetpack" in found) == ("Jetson" in found["board"])
    assert found.get("jetpack", "L4T 36.4.3, JetPack 6").startswith("L4T 36.4.3, JetPack 6")
    assert found["glibc"].startswith("glibc 2.36")
    assert {status for status, name, _ in checks if name == "inference"} == {"ok"}
    packages = {(text.split()[0], status) for status, name, text in checks if name == "packages"}
    runtimes = {"onnxruntime"} if "jetpack" in found else {"onnxruntime", "ai-edge-litert"}
    assert packages == {(name, "ok") for name in {"numpy", "msgspec", "zeroconf"} | runtimes}
    assert [name for status, name, _ in checks if status == "fail"] == ["camera"]
    assert "ffmpeg is not installed" in said


def answers(_: User, said: str) -> None:
    """A line for each picture, with the heat of this board."""
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [answer["frame"] for answer in found] == [f"{index}.png" for index in range(PHOTOS)], said
    assert {answer["temperature_c"] for answer in found} <= {48.3, 49.5}


def acts(_: User, said: str) -> None:
    """The camera app says something of each picture; a runtime may say something of itself."""
    assert len(re.findall(r"^.+ device +\d+ ms", said, re.MULTILINE)) == PHOTOS, said


def serves(user: User, said: str) -> None:
    """Unit, user and settings are there, and ExecStart runs as it stands, as that user, without privileges."""
    assert "kinflow-device.service is installed" in said
    root = user.board.root
    settings = root / "etc/kinflow/device.toml"
    settings.write_text(settings.read_text().replace("v4l2:/dev/video0", "folder:/kinflow/photos"))
    unit = (root / "etc/systemd/system/kinflow-device.service").read_text()
    command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command is not None
    as_service = ("setpriv", "--reuid=kinflow", "--regid=kinflow", "--init-groups", "--no-new-privs")
    said = user.board.run(*as_service, *shlex.split(command[1]), "--local", "--rate", "0", binds=user.binds)
    assert len([line for line in said.splitlines() if line.startswith("{")]) == PHOTOS, said
    assert re.search(r"^kinflow:.*:/usr/sbin/nologin$", (root / "etc/passwd").read_text(), re.MULTILINE)


def removes(_: User, said: str) -> None:
    assert said == "kinflow is removed\n"


def nothing_more(_: User, __: str) -> None:
    """That it ends well is enough."""


# What a line must have done, by the first pattern that it matches; the status that it must end with.
CHECKS: tuple[tuple[str, int, Callable[[User, str], None]], ...] = (
    (r"(sudo )?sh \S+/install.sh (--service )?--uninstall", 0, removes),
    (r"sudo sh \S+/install.sh --service", 0, serves),
    (r"sh \S+/install.sh --family imagenet_lite", 0, installs_another_family),
    (r"sh \S+/install.sh", 0, installs),
    (r"kinflow doctor", 1, examines),
    (r"kinflow device folder:", 0, answers),
    (r"kinflow tune", 0, installs),
    (r"\S+/python devices/\S+/camera.py ", 0, acts),
    (r"python3 -m venv ~/edge", 0, nothing_more),
)
# What a line says that needs what is not there; lines that need anything else are not run.
REFUSED = {"a camera": (2, "ffmpeg")}


def follow(user: User, line: Line) -> None:
    """Type the line and look at what it did."""
    if line.needs:
        if line.needs in REFUSED:
            status, said = user.types(line.words)
            wanted, word = REFUSED[line.needs]
            assert (status, word in said) == (wanted, True), f"{line.words}: status {status}\n{said[-2000:]}"
        return
    for pattern, wanted, check in CHECKS:
        if re.match(pattern, line.words):
            status, said = user.types(line.words)
            assert status == wanted, f"{line.words}: status {status}\n{said[-4000:]}"
            check(user, said)
            return
    raise AssertionError(f"nobody looks at what this line does: {line.words}")


@pytest.mark.parametrize("board", FACES)
def test_the_readme_is_followed_to_its_end(board: str, qemu: Parts, binds: dict[Path, str], tmp_path: Path) -> None:
    """Each line does what the page says. At the end not one file or user more is there than before."""
    user = User(Board.make(tmp_path / "root", qemu.root, FACES[board]), binds)
    user.board.run("true", binds=binds)
    clean = files_of(user.board)
    for line in lines(board):
        print(f"\n{board}: {line.words}" + (f"  (needs {line.needs})" if line.needs else ""), flush=True)
        before_s = spent_s()
        follow(user, line)
        print(f"{spent_s() - before_s:.0f} s of processor", flush=True)
    shutil.rmtree(user.board.root / "root/edge", ignore_errors=True)
    backups = {Path(f"etc/{name}-") for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")}
    left = files_of(user.board) - clean - backups - {Path("etc/.pwd.lock")}
    # Folders of every user's home and of systemd are not ours to remove.
    folders = ("root/.local", "root/.local/share", "root/.config", "root/.cache", "opt", "etc/systemd")
    shared = {Path(path) for path in (*folders, "etc/systemd/system", "usr/local", "usr/local/bin")}
    assert {path for path in left if path not in shared and not path.name.startswith(("shadow", "gshadow"))} == set()
    assert "kinflow" not in (user.board.root / "etc/passwd").read_text()


@pytest.mark.parametrize("board", FACES)
def test_every_line_is_looked_at(board: str) -> None:
    """From install to removal, and no line that is neither run nor said to need what an emulator lacks."""
    found = lines(board)
    assert found[0].words == f"sh devices/{board}/install.sh"
    assert found[0].section.startswith("From a fresh")
    for line in found:
        assert line.needs or any(re.match(pattern, line.words) for pattern, _, _ in CHECKS), line
