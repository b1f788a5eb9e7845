"""`kinflow chat` by pipe and in a terminal, and the colours of its texts. Real processes, a real server."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kinflow.cli.colours import legend, piece, showable, statistics
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.summary import Summary, Token
from test_cli import cli
from text_client import copy_tiny, text_of

LOCAL = ("--mode", "local")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    """It has all layers."""
    with Fleet([tiny]) as fleet:
        yield fleet.start("edge", "--member", "cloud", "--no-advertise")


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


# Conversations


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
    """What the terminal shows, up to the first `wanted` and no further: the rest is for the next call."""
    shown = b""
    give_up_s = time.monotonic() + timeout_s
    while not shown.endswith(wanted.encode()):
        assert time.monotonic() < give_up_s, shown[-500:]
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 1)
            except OSError as exc:  # the other end is gone
                raise AssertionError(shown[-500:]) from exc
    return shown.decode(errors="replace")


def test_ctrl_c_stops_a_reply_and_not_the_chat(tiny: Path, tmp_path: Path) -> None:
    """In a terminal, with colours: the reply ends early, the next one comes, and /quit ends with status 0."""
    # Long enough to be stopped on a busy machine: with its own context the reply is there after 0.2 s.
    endless = copy_tiny(tiny, tmp_path / "endless", context=8192)
    with terminal("chat", "--bundle", endless, *LOCAL, "--max-tokens", "8000") as (process, ours):
        head = read_until(ours, "> ")
        assert "\x1b[32mdevice, verified" in head
        os.write(ours, b"Is it late?\n")
        read_until(ours, "\n")
        read_until(ours, "w")  # a letter of the reply
        os.write(ours, b"\x03")
        stopped = read_until(ours, "tokens/s") + read_until(ours, "> ")
        found = re.search(r"(\d+) tokens: ", stopped)
        assert found
        assert int(found[1]) < 8000
        time.sleep(0.3)  # readline misses a signal that comes just before it listens, until the next key
        os.write(ours, b"\x03")  # at the prompt it ends nothing either
        read_until(ours, "/quit ends the conversation")
        os.write(ours, b"/quit\n")
        assert process.wait(20) == 0
