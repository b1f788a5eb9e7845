"""The command line as users run it: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kinflow
from kinflow import idx
from kinflow.discovery import Advert, Node
from kinflow.family import Family
from system_fixtures import heed_ctrl_c

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "families/fashion/bundle"
TIMEOUT_S = 120


def cli(
    *words: str | Path, stdin: bytes = b"", cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`python -m kinflow …`; `path` is one more place where distributions are looked for."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(path))))
    command = [sys.executable, "-m", "kinflow", *map(str, words)]
    return subprocess.run(
        command, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False, cwd=cwd, env=environment
    )


def refused(*words: str | Path, stdin: bytes = b"", path: Path | None = None) -> str:
    """The one line that a refused command prints."""
    done = cli(*words, stdin=stdin, path=path)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2, done
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def plugin(folder: Path, **commands: str) -> Path:
    """An installed distribution that adds commands."""
    info = folder / "guest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = {target}" for name, target in commands.items())
    (info / "entry_points.txt").write_text(f"[kinflow.commands]\n{entries}\n")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not of the family's size."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.effect_noise((60, 40), 80).save(path)
    return path


def test_version() -> None:
    """The package's own number."""
    assert cli("--version").stdout.decode() == f"kinflow {kinflow.__version__}\n"


def test_help_names_every_command_and_the_settings_file() -> None:
    """What there is can be found without the manual."""
    shown = cli("--help").stdout.decode()
    assert all(command in shown for command in ("demo", "run", "discover", "inspect", "doctor"))
    # Narrow columns break words anywhere.
    shown = "".join(cli("run", "--help").stdout.decode().replace("│", "").split())
    assert "/etc/kinflow/device.toml" in shown
    assert "height*width*channels" in shown


def test_without_typer_the_way_out_is_named() -> None:
    """A device's base install has no command line; it says how to get one."""
    code = "import sys; sys.modules['typer'] = None; from kinflow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs typer: pip install 'kinflow[cli]'\n"


def test_other_distributions_add_commands(tmp_path: Path) -> None:
    """A function and a typer application with commands of its own."""
    (tmp_path / "guest.py").write_text(
        "import typer\n"
        "app = typer.Typer()\n"
        "def greet(name: str) -> None:\n    '''Say hello.'''\n    print('hello', name)\n"
        "@app.command()\ndef one() -> None:\n    print('first')\n"
        "@app.command()\ndef two() -> None:\n    print('second')\n"
    )
    path = plugin(tmp_path, greet="guest:greet", many="guest:app")
    assert "Say hello." in cli("--help", path=path).stdout.decode()
    assert cli("greet", "you", path=path).stdout == b"hello you\n"
    assert cli("many", "two", path=path).stdout == b"second\n"


def test_a_command_without_its_extra_says_which_install_brings_it(tmp_path: Path) -> None:
    """It is still listed, the others still work, and no traceback is shown."""
    (tmp_path / "heavy.py").write_text("import a_module_that_is_not_installed\n")
    path = plugin(tmp_path, train="heavy:app")
    line = refused("train", "--epochs", "3", path=path)
    assert line == "error: kinflow train needs the module a_module_that_is_not_installed, which is not installed"
    assert "train" in cli("--help", path=path).stdout.decode()


def test_a_module_missing_inside_a_command_names_the_extra(tmp_path: Path) -> None:
    """`kinflow run` without a runtime, for instance: imports inside a command fail when it runs."""
    (tmp_path / "late.py").write_text("def go() -> None:\n    import a_module_that_is_not_installed\n")
    assert "a_module_that_is_not_installed" in refused("go", path=plugin(tmp_path, go="late:go"))


def test_a_broken_command_does_not_break_the_others(tmp_path: Path) -> None:
    """Whatever its module raises."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    path = plugin(tmp_path, oops="broken:app")
    assert "ZeroDivisionError" in refused("oops", path=path)
    assert cli("inspect", BUNDLE, path=path).returncode == 0


def test_an_unknown_command_is_refused() -> None:
    """With the status that shells expect of a usage error."""
    done = cli("fly")
    assert done.returncode == 2
    assert b"fly" in done.stderr


def test_run_shows_a_line_per_image_and_a_summary(picture: Path) -> None:
    """Piped output is plain text: no colours, nothing wrapped."""
    done = cli("run", "--local", picture, picture)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 4
    assert "\x1b" not in done.stdout.decode()
    assert lines[0].split() == ["image", "answer", "truth", "confidence", "tier", "up", "ms"]
    assert "noise.png" in lines[1]
    assert "device" in lines[1]
    assert lines[3].startswith("2 images · device 100.0%")


def test_run_answers_an_idx_file_with_accuracy(tmp_path: Path) -> None:
    """Labels beside the images are the truth: labelled with its own answers, the model is always right."""
    family = Family.load(BUNDLE)
    size = family.preprocess
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, size.height, size.width), np.uint8)
    idx.write(tmp_path / "some-images-idx3-ubyte.gz", images)
    source = tmp_path / "some-images-idx3-ubyte.gz"
    unlabelled = [json.loads(line) for line in cli("run", "--local", "--json", source).stdout.splitlines()]
    assert [record["truth"] for record in unlabelled] == [None] * 8
    labels = np.array([family.labels.index(record["label"]) for record in unlabelled], np.uint8)
    labels[0] = (labels[0] + 1) % len(family.labels)
    idx.write(tmp_path / "some-labels-idx1-ubyte", labels)
    shown = cli("run", "--local", source).stdout.decode()
    assert "accuracy 87.50% of 8" in shown
    limited = [json.loads(line) for line in cli("run", "--local", "--json", "--limit", "2", source).stdout.splitlines()]
    assert [record["truth"] == record["label"] for record in limited] == [False, True]


def test_run_reads_frames_from_standard_input() -> None:
    """Whole frames are answered; a truncated last one is an error, with the answers before it kept."""
    size = Family.load(BUNDLE).preprocess
    frame = bytes(size.height * size.width * len(size.mean))
    done = cli("run", "--local", "--json", "-", stdin=frame * 2)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == ["-[0]", "-[1]"]
    done = cli("run", "--local", "--json", "-", stdin=frame + b"half")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.decode().startswith("error: frame 1 on standard input is truncated: 4 bytes of")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["run", "--local", "/nowhere/cat.png"], "/nowhere/cat.png: No such file"),
        (["run", "--local", str(ROOT / "pyproject.toml")], "not an image"),
        (["run", "--local", "--bundle", "/nowhere", "x.png"], "/nowhere does not exist"),
        (["run", "--local", "--family", "nosuch", "x.png"], "families/nosuch/bundle"),
        (["run", "--local", "--backend", "abacus", "x.png"], "abacus"),
        (["run", "--deadline", "-1", "x.png"], "deadline_s"),
        (["run", "--broker", "host:port:7", "x.png"], "host:port:7"),
        (["run", "--settings", "/nowhere.toml", "x.png"], "/nowhere.toml"),
        (["inspect", str(ROOT / "docs")], "family.json"),
        (["discover", "--interface", "203.0.113.7"], "203.0.113.7"),
        (["--log-level", "loud", "inspect", str(BUNDLE)], "loud"),
        (["--log-format", "xml", "inspect", str(BUNDLE)], "xml"),
    ],
)
def test_a_mistake_is_one_line_with_the_name_of_what_is_wrong(words: list[str], what: str) -> None:
    """No traceback, exit status 2."""
    assert what in refused(*words)


def test_a_settings_file_is_read_and_a_flag_overrides_it(tmp_path: Path, picture: Path) -> None:
    """The file in the working directory is found without being named."""
    (tmp_path / "kinflow-device.toml").write_text('offload = false\nbackend = "abacus"\n')
    done = cli("run", "--bundle", BUNDLE, picture, cwd=tmp_path)
    assert done.returncode == 2
    assert b"kinflow-device.toml" in done.stderr
    done = cli("run", "--bundle", BUNDLE, "--backend", "onnx", picture, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_interrupting_is_quiet() -> None:
    """Ctrl-C ends a stream that would go on for ever: status 130, the summary, no traceback."""
    size = Family.load(BUNDLE).preprocess
    command = [sys.executable, "-m", "kinflow", "run", "--local", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=heed_ctrl_c) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(bytes(size.height * size.width * len(size.mean)))
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == b""
        assert process.stdout.read().decode().startswith("1 image ·")


def test_inspect_verifies_and_describes(tmp_path: Path) -> None:
    """Every member, split and exit; as JSON the same, and a damaged file is found."""
    family = Family.load(BUNDLE)
    shown = cli("inspect", BUNDLE).stdout.decode()
    manifest = family.manifest
    for name in (*manifest.members, *manifest.segments, *manifest.splits, *manifest.exits, family.version):
        assert name in shown
    about = json.loads(cli("inspect", "--json", BUNDLE).stdout)
    assert about["bytes"] == sum({file.path: file.bytes for file in manifest.files()}.values())
    assert set(about["members"]) == set(manifest.members)
    assert about["exits"].keys() == manifest.exits.keys()
    stored = about["segments"]["edge"]["graphs"]["onnx"]["precision"]
    assert stored == manifest.segments["edge"].graphs["onnx"].precision
    assert (stored or "not stated") in shown
    copy = tmp_path / "bundle"
    copy.mkdir()
    for name, data in {**family.files, "family.json": (BUNDLE / "family.json").read_bytes()}.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    assert cli("inspect", copy).returncode == 0
    victim = copy / next(iter(family.files))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00\x01"[victim.read_bytes()[-1] == 0 :][:1])
    assert "sha256" in refused("inspect", copy)


def test_discover_shows_what_the_broker_cannot_confirm() -> None:
    """An advert without a broker behind it is listed as unreachable: adverts are hints."""
    name = f"ghost-{os.urandom(4).hex()}"
    with Advert(Node(name, "cloud", "127.0.0.1", 9, (("fashion", "9.9"),))):
        done = cli("discover", "--interface", "127.0.0.1", "--timeout", "4", "--json")
        assert done.returncode == 0, done.stderr
        (found,) = [server for server in json.loads(done.stdout) if server["node"] == name]
        assert found["state"] == "unreachable"
        assert found["families"] == [["fashion", "9.9"]]
        assert found["load"] is None
        table = cli("discover", "--interface", "127.0.0.1", "--timeout", "4").stdout.decode()
        assert any(name in line and "unreachable" in line for line in table.splitlines())


def test_a_server_is_discovered_and_used(tmp_path: Path, picture: Path) -> None:
    """An edge server in a process of its own: found by zeroconf, described, asked, and found healthy."""
    name = f"edge-{os.urandom(4).hex()}"
    code = "import sys, typer; from kinflow_edge.cli import edge; typer.run(edge)"
    command = [sys.executable, "-c", code, str(BUNDLE), "--port", "0", "--node", name, "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            ready = json.loads(server.stdout.readline())
            time.sleep(0.2)
            done = cli("discover", "--interface", "127.0.0.1", "--timeout", "4", "--json")
            (found,) = [entry for entry in json.loads(done.stdout) if entry["node"] == name]
            family = Family.load(BUNDLE)
            assert (found["tier"], found["state"], found["address"]) == ("edge", "ready", ready["broker"])
            assert found["families"] == [[family.id, family.version]]
            assert found["queue_ms"] >= 0
            done = cli("run", "--broker", ready["broker"], "--threshold", "1", "--deadline", "10", "--json", picture)
            record = json.loads(done.stdout)
            assert record["tier"] == "edge", record
            assert record["bytes_up"] > 0
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(20)
