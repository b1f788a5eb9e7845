"""Language models from the command line: texts, bundles, the demo. Real processes, a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from kinflow.bundle import MANIFEST
from kinflow.fleet import Fleet, ServerProcess
from system_fixtures import FASHION, LOOPBACK, heed_ctrl_c, running
from test_cli import cli, refused
from text_client import text_of

LOCAL = ("--mode", "local")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    """It has all layers."""
    with Fleet([tiny]) as fleet:
        yield fleet.start("edge", "--member", "cloud", "--no-advertise")


def test_generate_writes_the_text_and_tells_its_cost_apart(tiny: Path, server: ServerProcess) -> None:
    """Into a pipe: the text alone, without colours; tiers, drafts, bytes and the server on standard error."""
    done = cli("generate", "Is it late?", "--bundle", tiny, "--broker", server.broker, "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == text_of(tiny, "Is it late?", server.broker, max_tokens=40) + "\n"
    (line,) = done.stderr.decode().splitlines()
    assert re.match(r"40 tokens: \d+ device, \d+ edge · \d+ of \d+ drafts accepted · \d+ bytes up per token", line)
    assert line.endswith(server.ready["node"])


def test_generate_as_json(tiny: Path, server: ServerProcess) -> None:
    """One object with text, every token and the summary, which agree with each other; a seed repeats it."""
    words = ("generate", "Name a bird.", "--bundle", tiny, "--broker", server.broker, "--json", "--max-tokens", "30")
    first, second = (
        json.loads(cli(*words, "--temperature", "0.9", "--top-p", "0.9", "--seed", "4").stdout) for _ in range(2)
    )
    assert first["text"] == second["text"] == "".join(token["text"] for token in first["tokens"])
    summary = first["summary"]
    assert len(first["tokens"]) == sum(summary["tokens"].values()) == 30
    for tier, count in summary["tokens"].items():
        assert sum(token["tier"] == tier for token in first["tokens"]) == count
    assert all(token["verified"] for token in first["tokens"])
    assert (summary["finish"], summary["degraded"], summary["servers"]) == ("length", False, [server.ready["node"]])
    greedy = json.loads(cli(*words).stdout)
    assert greedy["text"] != first["text"]


def test_generate_alone(tiny: Path) -> None:
    """Mode local needs nobody, and is not degraded; the prompt may come on standard input."""
    done = cli("generate", "-", "--bundle", tiny, *LOCAL, "--json", "--max-tokens", "20", stdin=b"Is it late?")
    made = json.loads(done.stdout)
    assert made["text"] == text_of(tiny, "Is it late?", max_tokens=20, mode="local")
    assert made["summary"]["unverified"] == 20
    assert not made["summary"]["degraded"]
    assert not done.stderr


def test_generate_without_a_server_says_so(tiny: Path) -> None:
    """The text comes all the same; nobody is left to think that it was verified."""
    done = cli("generate", "Hello", "--bundle", tiny, "--broker", "127.0.0.1:1", "--wait", "0.1", "--max-tokens", "5")
    assert done.returncode == 0
    told = done.stderr.decode()
    assert "no server found within 0.1 s" in told
    assert "none verified" in told
    assert "degraded: no connection to 127.0.0.1:1" in told


def test_ctrl_c_ends_generate_with_what_there_is(tiny: Path) -> None:
    """The text so far and its cost; status 130."""
    words = ["generate", "Hello", "--bundle", str(tiny), *LOCAL, "--max-tokens", "470"]
    with subprocess.Popen(
        [sys.executable, "-m", "kinflow", *words], bufsize=0, stdout=PIPE, stderr=PIPE, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stdout is not None
        began = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert text_of(tiny, "Hello", max_tokens=470, mode="local").encode().startswith((began + rest).rstrip())
    assert b"Traceback" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "x", "--bundle", FASHION / "bundle"), "use kinflow.Device, `kinflow run`"),
        (("chat", "--bundle", FASHION / "bundle"), "use kinflow.Device, `kinflow run`"),
        (("serve", FASHION / "bundle"), "use kinflow.Device, `kinflow run`"),
        (("generate", "x", "--bundle", "nowhere"), "nowhere does not exist"),
        (("generate", "x", "--family", "nobody"), "families/nobody/bundle"),
        (("generate", os.fsdecode(b"\xff"), "--bundle", "TINY", *LOCAL), "UTF-8"),
        (("generate", "x" * 600, "--bundle", "TINY", *LOCAL), "takes fewer than 512"),
        (("generate", "x", "--bundle", "TINY", *LOCAL, "--top-p", "0"), "top_p 0.0"),
        (("generate", "x", "--bundle", "TINY", *LOCAL, "--seed", str(1 << 64)), "seed"),
        (("generate", "x", "--bundle", "TINY", "--broker", "nonsense"), "nonsense"),
        (("serve", "TINY", *LOCAL, "--listen", "0.0.0.0"), "beyond loopback"),
        (("serve", "TINY", *LOCAL, "--parallel", "0"), "serve.parallel is 0"),
        (("run", "photo.png", "--bundle", "TINY"), "`kinflow chat` and `kinflow generate`"),
        (("verify", "TINY", "--member", "device"), "checked whole"),
    ],
)
def test_bad_input_gets_one_line(tiny: Path, words: tuple[Any, ...], told: str) -> None:
    """What is wrong, and often the way out; status 2."""
    assert told in refused(*(tiny if word == "TINY" else word for word in words))


def test_a_mode_that_is_none_is_refused(tiny: Path) -> None:
    """The others are listed."""
    done = cli("generate", "x", "--bundle", tiny, "--mode", "best")
    assert done.returncode == 2
    assert all(mode in done.stderr.decode() for mode in ("family", "exact", "confident", "local"))


# Bundles


def test_inspect_shows_a_language_model(tiny: Path) -> None:
    """Members, splits with bytes per token, exits with agreement and perplexity, sizes at both precisions."""
    about = json.loads(cli("inspect", tiny, "--json").stdout)
    manifest = json.loads((tiny / MANIFEST).read_text())
    assert about["files_verified"] == 11
    assert about["bytes"] == sum(file.stat().st_size for file in tiny.iterdir() if file.name != MANIFEST)
    assert about["model"]["context"] == 512
    assert set(about["members"]["device"]["bytes"]) == {"float", "int8"}
    assert set(about["members"]["cloud"]["bytes"]) == {"float"}
    assert about["splits"]["s1"]["codecs"]["int8"] == {"kind": "token-int8", "token_bytes": 66}
    assert about["exits"]["edge"]["perplexity"] == manifest["exits"]["edge"]["perplexity"]
    shown = cli("inspect", tiny).stdout.decode()
    for word in (
        "text-generation, 6 layers",
        "lower > branch-device > head",
        "agreement",
        "perplexity",
        "int8 (default)",
    ):
        assert word in shown


def test_a_language_model_is_signed_and_verified(tiny: Path, tmp_path: Path) -> None:
    """As other bundles are; a changed graph is found, also by `inspect`."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny, folder)
    (tmp_path / "passphrase").write_text("correct horse")
    signed = cli("sign", folder, "--key", tmp_path / "key", "--new-key", "--passphrase-file", tmp_path / "passphrase")
    assert signed.returncode == 0, signed.stderr
    key = re.search(r"ed25519:\w+", signed.stdout.decode())
    assert key
    assert f"11 files are whole; signed by {key[0]}" in cli("verify", folder, "--key", key[0]).stdout.decode()
    assert "no valid signature" in refused("verify", tiny, "--key", key[0])
    graph = folder / "head-int8.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    for command in ("verify", "inspect"):
        assert "head-int8.onnx has sha256" in refused(command, folder)


def test_doctor_has_a_text_verified(tiny: Path, server: ServerProcess) -> None:
    """The checks of an inference and of a server's help use the model that is named."""
    done = cli("doctor", "--bundle", tiny, "--broker", server.broker, "--interface", LOOPBACK, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["inference"]["status"] == "ok"
    assert "writes 8 tokens" in checks["inference"]["found"]
    assert checks["offload"]["status"] == "ok", checks["offload"]
    assert f"{server.ready['node']} verified 8 tokens" in checks["offload"]["found"]


# The demo


@pytest.fixture(scope="module")
def own(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's folder."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copytree(tiny, folder / "bundle")
    return folder


def test_the_demos_summary_is_one_json_object(own: Path) -> None:
    """Two tiers, then three, three replies each, and not one process left."""
    with running("demo-text", "--family", str(own), "--max-tokens", "30", "--json") as run:
        assert run.wait(90) == 0, run.err[-5:]
        assert run.gone()
        (line,) = run.out
    summary = json.loads(line)
    assert len(summary["replies"]) == 6
    two, three = summary["settings"]["device and edge"], summary["settings"]["device, edge and cloud"]
    assert sum(two["tokens"].values()) == sum(three["tokens"].values()) == 90
    assert two["tokens"]["edge"] > 0
    assert three["tokens"]["cloud"] > 0
    assert two["degraded"] == three["degraded"] == two["unverified"] == 0
    assert 0 < two["acceptance"] < 1
    # The edge's pass, and the cloud's behind most of them.
    assert 0 < two["passes_per_token"] < three["passes_per_token"]


def test_a_server_that_dies_in_the_demo_is_told_and_missed(own: Path) -> None:
    """Every reply is written to its end all the same; then a table."""
    with running("demo-text", "--family", str(own), "--max-tokens", "200") as run:
        pid = int(run.line(r"edge server: pid (\d+)")[1])
        run.line(r"^> Why")
        os.kill(pid, signal.SIGKILL)
        assert run.wait(90) == 0, run.err[-5:]
        told = "\n".join(run.out)
        assert f"the edge server (pid {pid}) died, status -9; the device goes on writing" in told
        assert "degraded: " in told
        assert "tokens per second" in told
        assert run.gone()


def test_ctrl_c_ends_every_process_of_the_demo(own: Path) -> None:
    """In the middle of a reply."""
    with running("demo-text", "--family", str(own), "--max-tokens", "400", "--json") as run:
        run.line(r"^> Why")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(30) == 130
        assert run.gone()
        assert "Traceback" not in "\n".join(run.err)
