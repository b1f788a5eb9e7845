"""What lies in devices/: scripts that parse, a unit that systemd takes, apps that run, containers whose files exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from kinflow import settings
from system_fixtures import sample_images

DEVICES = ROOT / "devices"
BOARDS = ["raspberrypi", "jetson"]
UNIT = DEVICES / "kinflow-device.service"


@pytest.mark.parametrize("script", sorted(DEVICES.rglob("*.sh")), ids=lambda path: str(path.relative_to(DEVICES)))
def test_scripts_parse(script: Path) -> None:
    """By the shell of the boards."""
    done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "there is no board nonsense"),
        (["raspberrypi", "--nonsense"], "unknown option --nonsense"),
        (["jetson", "--extras"], "--extras needs a list"),
        (["jetson", "--family", "absent"], "--family absent: there is no bundle of it here, only of:"),
        (["jetson", "--family", "../families/fashion"], "there is no bundle of it here"),
    ],
)
def test_install_refuses_what_it_does_not_know(words: list[str], said: str, tmp_path: Path) -> None:
    """Status 2 or so, a line that says why, and nothing was made."""
    done = subprocess.run(
        ["sh", str(DEVICES / "install.sh"), *words],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_uninstall_without_an_install_removes_nothing(tmp_path: Path) -> None:
    """Somebody else's `kinflow` and settings in the same folders stay."""
    other = tmp_path / ".local/bin/kinflow"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    kept = tmp_path / ".config/kinflow/edge.toml"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    subprocess.run(
        ["sh", str(DEVICES / "raspberrypi/install.sh"), "--uninstall"],
        check=True,
        capture_output=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert other.is_file()
    assert kept.is_file()


@pytest.mark.parametrize("board", BOARDS)
def test_the_unit_is_what_systemd_takes(board: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, with the board's own part beside it."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    # The command and the user are not on this machine.
    text = UNIT.read_text().replace("/opt/kinflow/venv/bin/kinflow", "/bin/true").replace("=kinflow\n", "=root\n", 2)
    unit.write_text(text)
    (tmp_path / f"{UNIT.name}.d").mkdir()
    shutil.copy(DEVICES / board / "service.conf", tmp_path / f"{UNIT.name}.d/board.conf")
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    about_it = [line for line in done.stderr.splitlines() if "kinflow" in line]
    assert about_it == []
    unit.write_text(text + "\n[Service]\nMemoryMix=1\n")
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert "MemoryMix" in done.stderr


def test_the_unit_is_hardened() -> None:
    """Own user, watchdog, restart, a memory limit, no new privileges."""
    text = UNIT.read_text()
    for line in (
        *("Type=notify", "User=kinflow", "Restart=always", "NoNewPrivileges=yes", "ProtectSystem=strict"),
        *("CapabilityBoundingSet=", "SystemCallFilter=@system-service", "DevicePolicy=closed"),
    ):
        assert f"\n{line}\n" in text, line
    assert re.search(r"^WatchdogSec=\d+$", text, re.MULTILINE)
    assert re.search(r"^MemoryMax=\d+M$", text, re.MULTILINE)


@pytest.mark.parametrize("board", BOARDS)
def test_settings_of_the_board(board: str, tmp_path: Path) -> None:
    """The file that install.sh writes is one that `kinflow device` reads."""
    text = (DEVICES / board / "device.toml").read_text()
    assert text.startswith("# kinflow-device.toml\n")
    (tmp_path / "tuned.toml").write_text(
        'backend = "onnx"\naccelerator = "cpu"\nthreads = 3\nfamily = "fashion 1"\nboard = "Pi"\n'
    )
    file = tmp_path / "device.toml"
    file.write_text(text.replace("@state@", str(tmp_path)).replace("@bundle@", str(ROOT / "families/fashion/bundle")))
    chosen = settings.load("device", settings.DeviceSettings, file)
    assert chosen.threads == 3
    assert Path(chosen.service.bundle).is_dir()


@pytest.mark.parametrize("board", BOARDS)
def test_camera_apps_run_and_are_short(board: str, tmp_path: Path) -> None:
    """Under sixty lines; frames from a folder are answered; without arguments it says how to call it."""
    app = DEVICES / board / "camera.py"
    assert len(app.read_text().splitlines()) < 60
    for index, image in enumerate(sample_images(3)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    command = [sys.executable, str(app), str(ROOT / "families/fashion/bundle"), f"folder:{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    done = subprocess.run(command[:2], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "camera.py" in done.stderr
    done = subprocess.run([*command[:3], "folder:/nowhere"], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.endswith("error: /nowhere: No such file or directory\n")


def instructions(board: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continued lines joined, comments left out."""
    text = (DEVICES / board / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("board", BOARDS)
def test_container_instructions(board: str) -> None:
    """No engine is needed to see that files exist, shells parse, extras are there, and root is left behind."""
    found = instructions(board)
    known = {"FROM", "COPY", "RUN", "USER", "ENV", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in found} <= known
    assert found[0][0] == "FROM"
    stages = re.findall(r" AS (\w+)", " ".join(rest for word, rest in found if word == "FROM"))
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for word, rest in found:
        if word == "COPY":
            *sources, target = [each for each in rest.split() if not each.startswith("--")]
            assert target.startswith("/")
            if stage := re.search(r"--from=(\w+)", rest):
                assert stage[1] in stages
            else:
                assert all((ROOT / source).exists() for source in sources), rest
        if word == "RUN":
            assert subprocess.run(["sh", "-nc", rest], check=False).returncode == 0, rest
            for wanted in re.findall(r"\[([\w,]+)\]", rest):
                assert all(f"\n{extra} = [" in extras for extra in wanted.split(",")), rest
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(each, str) for each in json.loads(rest))
    assert [rest for word, rest in found if word == "USER"] == ["kinflow"]
    last_run = max(index for index, (word, _) in enumerate(found) if word == "RUN")
    assert next(index for index, (word, _) in enumerate(found) if word == "USER") > last_run
    runs = " ".join(rest for word, rest in found if word == "RUN")
    assert "--no-cache-dir" in runs
    assert "rm -rf /var/lib/apt/lists/*" in runs


@pytest.mark.parametrize("board", BOARDS)
def test_container_starts_what_kinflow_has(board: str) -> None:
    """The entry point's words are those of `kinflow device`."""
    import typer

    from kinflow.cli.app import app

    words = dict(instructions(board))
    line = json.loads(words["ENTRYPOINT"])[1:] + json.loads(words["CMD"])
    command = typer.main.get_command(app)
    context = command.make_context("kinflow", list(line))
    assert shlex.join(line).startswith("device --bundle ")
    _, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
    sub.make_context("device", rest, parent=context)
