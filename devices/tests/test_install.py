"""A user's way on an emulated Raspberry Pi: the README's lines, the service's own start, the camera app, the removal."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulator import Board
from PIL import Image

import kinflow.idx
from conftest import QUICK, ROOT, VENV, compile_here

PHOTOS = 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames for a board without a camera."""
    folder = tmp_path_factory.mktemp("photos")
    for index, image in enumerate(kinflow.idx.read(ROOT / "families/fashion/samples/images-idx3-ubyte.gz")[:PHOTOS]):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def files_of(board: Board) -> set[Path]:
    """Everything on the board, but what every program leaves there."""
    return {
        path.relative_to(board.root)
        for path in board.root.rglob("*")
        if not {"proc", "dev", "__pycache__", "tmp"} & set(path.relative_to(board.root).parts)
    }


@pytest.fixture(scope="module")
def binds(checkout: Path, wheels: Path, photos: Path) -> dict[Path, str]:
    return {checkout: "/kinflow", wheels: "/wheels", photos: "/photos"}


@pytest.fixture(scope="module")
def clean(pi: Board, binds: dict[Path, str]) -> set[Path]:
    """The board's files before anything was installed."""
    pi.run("true", binds=binds)
    return files_of(pi)


@pytest.fixture(scope="module")
def installed(pi: Board, binds: dict[Path, str], clean: set[Path]) -> Iterator[Board]:
    """After `install.sh`, for one user."""
    assert clean
    said = pi.run(
        "sh", "/kinflow/devices/raspberrypi/install.sh", "--wheels", "/wheels", binds=binds, environment=QUICK
    )
    assert "chosen: " in said
    compile_here(pi.root / VENV.strip("/") / "lib")
    yield pi


def test_kinflow_runs_as_installed(installed: Board, binds: dict[Path, str]) -> None:
    """The command is on the PATH of the README, the settings name what was tuned, and pictures are answered."""
    settings = (installed.root / "root/.config/kinflow/device.toml").read_text()
    assert 'tuned = "/root/.local/share/kinflow/tuned.toml"' in settings
    tuned = (installed.root / "root/.local/share/kinflow/tuned.toml").read_text()
    assert 'board = "Raspberry Pi 4 Model B Rev 1.4"' in tuned
    assert re.search(r'^backend = "(onnx|tflite)"$', tuned, re.MULTILINE)
    words = ("device", "folder:/photos", "--rate", "0", "--local")
    said = installed.run("/root/.local/bin/kinflow", *words, binds=binds)
    answers = [json.loads(line) for line in said.splitlines()]
    assert [answer["frame"] for answer in answers] == [f"{index}.png" for index in range(PHOTOS)]
    assert {answer["temperature_c"] for answer in answers} == {48.3}


def test_doctor_knows_the_board(installed: Board, binds: dict[Path, str]) -> None:
    """Model, heat and wheels by the name of this board; the only failure is the camera that is not there."""
    bundle = "/root/.local/share/kinflow/families/fashion"
    command = f"/root/.local/bin/kinflow doctor --json --interface 127.0.0.1 --bundle {bundle} || true"
    report = json.loads(installed.run("sh", "-c", command, binds=binds))
    found = {check["name"]: check for check in report["checks"]}
    assert "Raspberry Pi 4 Model B Rev 1.4, 48 °C of 80" in found["board"]["found"]
    assert found["glibc"]["found"] == "glibc 2.36"
    assert found["inference"]["status"] == "ok"
    packages = [check for check in report["checks"] if check["name"] == "packages"]
    assert len(packages) >= 5
    assert {check["status"] for check in packages} == {"ok"}
    assert [check["name"] for check in report["checks"] if check["status"] == "fail"] == ["camera"]


def test_the_camera_app_answers_frames_from_a_folder(installed: Board, binds: dict[Path, str]) -> None:
    """Both boards' apps, with the environment that install.sh made."""
    bundle = "/root/.local/share/kinflow/families/fashion"
    for board in ("raspberrypi", "jetson"):
        app = f"/kinflow/devices/{board}/camera.py"
        said = installed.run(f"{VENV}/bin/python", app, bundle, "folder:/photos", binds=binds)
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
    settings.write_text(settings.read_text().replace("v4l2:/dev/video0", "folder:/photos"))
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
    shared = {Path(path) for path in ("root/.local", "root/.local/share", "root/.config", "etc/systemd/system")}
    assert {path for path in left if path not in shared and not path.name.startswith(("shadow", "gshadow"))} == set()
    assert "kinflow" not in (installed.root / "etc/passwd").read_text()
