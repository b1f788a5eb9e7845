"""A user's way on an emulated board: the README's lines, the service's own start, the camera app, the removal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from emulator import Board
from PIL import Image

import kinflow.idx
from conftest import QUICK, ROOT, VENV, Parts, compile_here

PHOTOS = 3


@pytest.fixture(scope="module")
def binds(checkout: Path, wheels: Path) -> dict[Path, str]:
    """The user's folder with the project, with frames for a board without a camera, and the wheels."""
    folder = checkout / "photos"
    folder.mkdir()
    for index, image in enumerate(kinflow.idx.read(ROOT / "families/fashion/samples/images-idx3-ubyte.gz")[:PHOTOS]):
        Image.fromarray(image).save(folder / f"{index}.png")
    return {checkout: "/kinflow", wheels: "/wheels"}


def files_of(board: Board) -> set[Path]:
    """Everything on the board, but what every program leaves there."""
    return {
        path.relative_to(board.root)
        for path in board.root.rglob("*")
        if not {"proc", "dev", "__pycache__", "tmp"} & set(path.relative_to(board.root).parts)
    }


@pytest.fixture(scope="module")
def clean(pi: Board, binds: dict[Path, str]) -> set[Path]:
    """The board's files before anything was installed."""
    pi.run("true", binds=binds)
    return files_of(pi)


def readme_lines(board: str) -> list[str]:
    """What the page tells a user to type first: install, doctor, pictures."""
    page = (ROOT / "devices" / board / "README.md").read_text(encoding="utf-8")
    first = re.search(r"```sh\n(.*?)```", page, re.DOTALL)
    assert first is not None
    return first[1].splitlines()


def follow(board: Board, line: str, binds: dict[Path, str]) -> str:
    """Type one line of a README in the checkout, after logging in. Wheels stand in for the network."""
    line += " --wheels /wheels" if "install.sh" in line else ""
    typed = f"cd /kinflow && PATH=$HOME/.local/bin:$PATH && {line}"
    return board.run("sh", "-c", typed, binds=binds, environment=QUICK)


@pytest.fixture(scope="module")
def installed(pi: Board, binds: dict[Path, str], clean: set[Path]) -> Board:
    """After the README's first line."""
    assert clean
    install = readme_lines("raspberrypi")[0]
    assert install == "sh devices/raspberrypi/install.sh"
    assert "chosen: " in follow(pi, install, binds)
    compile_here(pi.root / VENV.strip("/") / "lib")
    return pi


def test_the_readme_holds_word_for_word(installed: Board, binds: dict[Path, str]) -> None:
    """The lines after the first one; `kinflow doctor` ends with 1 on a board without its camera, and says that."""
    settings = (installed.root / "root/.config/kinflow/device.toml").read_text()
    assert 'tuned = "/root/.local/share/kinflow/tuned.toml"' in settings
    tuned = (installed.root / "root/.local/share/kinflow/tuned.toml").read_text()
    assert 'board = "Raspberry Pi 4 Model B Rev 1.4"' in tuned
    assert re.search(r'^backend = "(onnx|tflite)"$', tuned, re.MULTILINE)
    _, doctor, pictures = readme_lines("raspberrypi")
    assert "camera     ffmpeg is not installed -> apt install ffmpeg" in follow(installed, f"{doctor} || true", binds)
    answers = [json.loads(line) for line in follow(installed, pictures, binds).splitlines()]
    assert [answer["frame"] for answer in answers] == [f"{index}.png" for index in range(PHOTOS)]
    assert {answer["temperature_c"] for answer in answers} == {48.3}


def test_doctor_knows_the_board(installed: Board, binds: dict[Path, str]) -> None:
    """Model, heat and wheels by the name of this board; the only failure is the camera that is not there."""
    bundle = "/root/.local/share/kinflow/families/fashion"
    command = f"kinflow doctor --json --interface 127.0.0.1 --bundle {bundle} || true"
    report = json.loads(follow(installed, command, binds))
    found = {check["name"]: check for check in report["checks"]}
    assert "Raspberry Pi 4 Model B Rev 1.4, 48 °C of 80" in found["board"]["found"]
    assert found["glibc"]["found"] == "glibc 2.36"
    assert found["inference"]["status"] == "ok"
    packages = [check for check in report["checks"] if check["name"] == "packages"]
    assert len(packages) >= 5
    assert {check["status"] for check in packages} == {"ok"}
    assert [check["name"] for check in report["checks"] if check["status"] == "fail"] == ["camera"]


def test_the_readme_of_the_jetson_holds(installed: Board, qemu: Parts, binds: dict[Path, str], tmp_path: Path) -> None:
    """The same lines on an Orin's face; its Python environment is a copy, which install.sh then brings up to date."""
    jetson = Board.make(tmp_path / "root", qemu.root, "jetson-orin")
    shutil.copytree(installed.root / VENV.strip("/"), jetson.root / VENV.strip("/"), symlinks=True)
    install, doctor, pictures = readme_lines("jetson")
    assert "chosen: " in follow(jetson, install, binds)
    said = follow(jetson, f"{doctor} || true", binds)
    assert "NVIDIA Jetson Orin Nano Developer Kit, 50 °C of 99" in said
    assert "L4T 36.4.3, JetPack 6" in said
    assert len(follow(jetson, pictures, binds).splitlines()) == PHOTOS


def test_the_camera_app_answers_frames_from_a_folder(installed: Board, binds: dict[Path, str]) -> None:
    """Both boards' apps, with the environment that install.sh made."""
    bundle = "/root/.local/share/kinflow/families/fashion"
    for board in ("raspberrypi", "jetson"):
        app = f"/kinflow/devices/{board}/camera.py"
        said = installed.run(f"{VENV}/bin/python", app, bundle, "folder:/kinflow/photos", binds=binds)
        assert len(said.splitlines()) == PHOTOS, said


def test_the_service_starts_by_its_own_command(installed: Board, binds: dict[Path, str]) -> None:
    """`--service` for the machine beside the user's install: unit, user, settings; and ExecStart as it stands there."""
    # The second environment is a copy of the first, as if it had been made: what is new here is all around it.
    moved = f"mkdir -p /opt/kinflow && cp -a {VENV} /opt/kinflow/venv && sed -i s,{VENV},/opt/kinflow/venv,g"
    installed.run("sh", "-c", f"{moved} /opt/kinflow/venv/bin/kinflow /opt/kinflow/venv/bin/pip*", binds=binds)
    words = ("sh", "/kinflow/devices/raspberrypi/install.sh", "--service", "--wheels", "/wheels")
    said = installed.run(*words, binds=binds, environment=QUICK)
    assert "kinflow-device.service is installed" in said
    settings = installed.root / "etc/kinflow/device.toml"
    settings.write_text(settings.read_text().replace("v4l2:/dev/video0", "folder:/kinflow/photos"))
    unit = (installed.root / "etc/systemd/system/kinflow-device.service").read_text()
    command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command is not None
    as_service = ("setpriv", "--reuid=kinflow", "--regid=kinflow", "--init-groups", "--no-new-privs")
    said = installed.run(*as_service, *shlex.split(command[1]), "--local", "--rate", "0", binds=binds)
    assert len(said.splitlines()) == PHOTOS
    passwd = (installed.root / "etc/passwd").read_text()
    assert re.search(r"^kinflow:.*:/usr/sbin/nologin$", passwd, re.MULTILINE)


def test_uninstall_leaves_nothing(installed: Board, binds: dict[Path, str], clean: set[Path]) -> None:
    """Service and user's install are removed; not one file or user more is there than before."""
    for words in (("--service", "--uninstall"), ("--uninstall",)):
        said = installed.run("sh", "/kinflow/devices/raspberrypi/install.sh", *words, binds=binds)
        assert said == "kinflow is removed\n"
    backups = {Path(f"etc/{name}-") for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")}
    locks = {Path("etc/.pwd.lock")}
    left = files_of(installed) - clean - backups - locks
    # Folders of every user's home and of systemd are not ours to remove.
    folders = ("root/.local", "root/.local/share", "root/.config", "root/.cache", "opt", "etc/systemd")
    shared = {Path(path) for path in (*folders, "etc/systemd/system", "usr/local", "usr/local/bin")}
    assert {path for path in left if path not in shared and not path.name.startswith(("shadow", "gshadow"))} == set()
    assert "kinflow" not in (installed.root / "etc/passwd").read_text()
