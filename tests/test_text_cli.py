"""Language models from the command line: texts, conversations, bundles, the demo. Real processes, a real server."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from brokers import wait_until
from kinflow.bundle import MANIFEST
from kinflow.cli.colours import legend, piece, showable, statistics
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.summary import Summary, Token
from system_fixtures import FASHION, LOOPBACK, running
from test_cli import cli, refused

LOCAL = ("--mode", "local")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    """It has all layers."""
    with Fleet([tiny]) as fleet:
        yield fleet.start("edge", "--member", "cloud", "--no-advertise")


def text_of(tiny: Path, prompt: str, broker: str = "", **options: Any) -> str:
    """What the SDK generates."""
    with TextDevice.open(tiny, DeviceSettings(broker=broker, offload=bool(broker))) as device:
        assert not broker or device.wait_for_server(20)
        return "".join(token.text for token in device.generate(prompt, **options))


# generate


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
    with running("generate", "Hello", "--bundle", str(tiny), *LOCAL, "--max-tokens", "470") as run:
        # The one line of the text is not whole yet, so no reader shows it: wait until the process works.
        wait_until(lambda: _cpu_s(run.process.pid) > 1.2 or run.process.poll() is not None, 30)
        run.process.send_signal(signal.SIGINT)
        status = run.wait(20)
        if status != 0:  # it was not done already
            assert status == 130
        assert "Traceback" not in "\n".join(run.err)


def _cpu_s(pid: int) -> float:
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


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


# Colours


def coloured(*texts: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", highlight=False)
    for text in texts:
        console.print(text, end="")
    return out.getvalue()


def test_each_tier_has_its_colour() -> None:
    """A draft that stood, the edge's and the cloud's word look different, and what nobody verified has none."""
    shown = {
        coloured(piece(Token(1, "word", tier, 0.5, verified)))
        for tier, verified in (("device", True), ("device", False), ("edge", True), ("cloud", True))
    }
    assert len(shown) == 4
    assert "word" in shown
    key = coloured(legend())
    assert all(word in key for word in ("device, verified", "device, not verified", "edge", "cloud"))
    for code in re.findall(r"\x1b\[\d+m", "".join(shown)):
        assert code in key


def test_a_models_text_steers_no_terminal() -> None:
    """Escapes and bells are dropped, lines and letters stay."""
    assert showable("a\x1b[2J\x07b\n\tü\u202e\r") == "a[2Jb\n\tü"


def test_statistics_name_what_matters() -> None:
    """In one line; the reason why a text is degraded in another."""
    summary = Summary("family", 10, {"device": 6, "edge": 1, "cloud": 3}, unverified=2, drafted=8, accepted=4)
    summary.verifications, summary.passes, summary.bytes_up, summary.seconds = 4, 6, 5000, 2.0
    summary.servers, summary.degraded, summary.reason = ["one", "two"], True, "one is gone"
    assert statistics(summary).plain == (
        "10 tokens: 6 device, 1 edge, 3 cloud, 2 of the device's not verified · 4 of 8 drafts accepted · "
        "500 bytes up per token · 0.60 passes per token · 2.0 s, 5.0 tokens/s · one, then two\ndegraded: one is gone"
    )
    assert statistics(Summary("local")).plain.startswith("no tokens")


# chat


def test_chat_by_pipe(tiny: Path) -> None:
    """A legend, then a reply and its cost for each line; commands are told apart, the end of input ends it."""
    said = b"Is it late?\n\n/mode local\n/mode best\n/reset\nIs it late?\n"
    done = cli("chat", "--bundle", tiny, *LOCAL, "--max-tokens", "20", stdin=said)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == ["tiny 1.0.0, mode local; /help lists the commands", legend().plain]
    reply = text_of(tiny, "Is it late?", max_tokens=20, mode="local")
    # After /reset the same question gets the same reply.
    assert lines.count(reply) == 2
    assert sum(line.startswith("20 tokens: 20 device, none verified · ") for line in lines) == 2
    assert "mode local" in lines
    assert lines.count("/quit       end, as Ctrl-D does") == 1


def test_chat_remembers_what_was_said(tiny: Path, server: ServerProcess) -> None:
    """The second reply depends on the first turn; the system's word stands before both."""
    options = ("--bundle", tiny, "--broker", server.broker, "--max-tokens", "20", "--system", "Be brief.")
    done = cli("chat", *options, stdin=b"One?\nTwo?\n/quit\nThree?\n")
    shown = done.stdout.decode()
    with TextDevice.open(tiny, DeviceSettings(broker=server.broker)) as device:
        assert device.wait_for_server(20)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
        first = "".join(token.text for token in device.generate(messages, max_tokens=20))
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Two?"}]
        second = "".join(token.text for token in device.generate(messages, max_tokens=20))
    assert f"\n{first}\n20 tokens: " in shown
    assert f"\n{second}\n20 tokens: " in shown
    assert shown.count("tokens/s") == 2


def test_chat_forgets_the_oldest_turns(tiny: Path) -> None:
    """A conversation longer than the model's context goes on and says what it forgot; a line that long is refused."""
    said = b"".join(b"x" * 150 + b"\n" for _ in range(4)) + b"y" * 600 + b"\nend\n"
    done = cli("chat", "--bundle", tiny, *LOCAL, "--max-tokens", "10", stdin=said)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert "of the oldest replies; the model takes 512 tokens" in shown
    assert "error: the prompt has 6" in shown
    assert shown.count("tokens/s") == 5


@contextmanager
def terminal(*words: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command in a terminal of its own: (process, the terminal's other end)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "kinflow", *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(ours: int, wanted: str, timeout_s: float = 30.0) -> str:
    """What the terminal shows, up to the first `wanted`."""
    shown = ""
    give_up_s = time.monotonic() + timeout_s
    while wanted not in shown:
        assert time.monotonic() < give_up_s, shown[-500:]
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 65536).decode(errors="replace")
            except OSError as exc:  # the other end is gone
                raise AssertionError(shown[-500:]) from exc
    return shown


def test_ctrl_c_stops_a_reply_and_not_the_chat(tiny: Path) -> None:
    """In a terminal, with colours: the reply ends early, the next one comes, and /quit ends with status 0."""
    with terminal("chat", "--bundle", tiny, *LOCAL, "--max-tokens", "470") as (process, ours):
        head = read_until(ours, "> ")
        assert "\x1b[32mdevice, verified" in head
        os.write(ours, b"Is it late?\n")
        read_until(ours, "\n")
        read_until(ours, "w")  # a letter of the reply
        os.write(ours, b"\x03")
        stopped = read_until(ours, "tokens/s") + read_until(ours, "> ")
        found = re.search(r"(\d+) tokens: ", stopped)
        assert found
        assert int(found[1]) < 470
        time.sleep(0.3)  # readline misses a signal that comes just before it listens, until the next key
        os.write(ours, b"\x03")  # at the prompt it ends nothing either
        read_until(ours, "/quit ends the conversation")
        os.write(ours, b"/quit\n")
        assert process.wait(20) == 0


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
