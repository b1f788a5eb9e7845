"""An emulated device and an x86-64 edge server on one LAN: found by zeroconf, lost, found again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import faces
import pytest
from emulator import Board

from conftest import Parts, Sdk
from system_fixtures import copy_bundle, running, sample_images

IP = shutil.which("ip") or "/sbin/ip"
SERVER, DEVICE = "10.79.0.1", "10.79.0.2"


def ip(*words: str) -> None:
    subprocess.run([IP, *words], check=True, capture_output=True, timeout=20)


@contextmanager
def bridge() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces on a bridge in a third; nothing of this machine's network is touched."""
    mark = f"boards{os.urandom(3).hex()}"
    names = {role: f"{mark}-{role}" for role in ("lan", "server", "device")}
    with ExitStack() as stack:
        for name in names.values():
            ip("netns", "add", name)
            stack.callback(subprocess.run, [IP, "netns", "del", name], check=False)
            ip("-n", name, "link", "set", "lo", "up")
        lan = names["lan"]
        ip("-n", lan, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", lan, "link", "set", "br0", "up")
        for role, address in (("server", SERVER), ("device", DEVICE)):
            name = names[role]
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", role, "netns", lan)
            ip("-n", lan, "link", "set", role, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "brd", "+", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "route", "add", "224.0.0.0/4", "dev", "eth0")
        yield names["server"], names["device"]


class Answers:
    """What a device process says, while frames are written to it."""

    def __init__(self, process: subprocess.Popen[bytes], frame: bytes) -> None:
        self._process = process
        self._frame = frame
        self.said: list[dict[str, Any]] = []
        threading.Thread(target=self._feed, daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            while True:
                self._process.stdin.write(self._frame)
                self._process.stdin.flush()
                time.sleep(0.2)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.said.append(json.loads(line))

    def until(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 900.0) -> dict[str, Any]:
        """The first answer from now on that is as wanted."""
        start, give_up_s = len(self.said), time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            for answer in self.said[start:]:
                if wanted(answer):
                    return answer
            assert self._process.poll() is None, self._process.stderr and self._process.stderr.read()[-2000:]
            time.sleep(0.1)
        raise AssertionError(f"not within {timeout_s:.0f} s; last: {self.said[-3:]}")


def identities(folder: Path) -> None:
    """An authority, a server's certificate and a device's, as docs/servers.md makes them."""
    (folder / "word").write_text("a passphrase for tests")
    enrol = ("pki", "enrol", "pi", "--at", "/identity")
    for words in (("pki", "init"), ("pki", "issue", "edge", "kitchen"), enrol):
        with running(*words, "--passphrase-file", "word", cwd=folder) as run:
            assert run.wait() == 0, run.err


@pytest.mark.skipif(shutil.which("mosquitto", path="/usr/sbin:/usr/bin") is None, reason="mosquitto is not installed")
def test_a_board_finds_loses_and_finds_its_server(qemu: Parts, sdk: Sdk, tmp_path: Path) -> None:
    """Nobody tells the board an address. The server is killed: local answers, degraded; it comes back: edge answers.

    Mutual TLS all the while: the broker takes no connection without a certificate.
    """
    pytest.importorskip("cryptography", reason="certificates are made with it: pip install 'kinflow[pki]'")
    identities(tmp_path)
    bundle = copy_bundle(tmp_path / "bundle", thresholds={"device": 1.0, "edge": 0.0})
    # As little as possible is emulated: the deadline is a slow processor's, everything else as on a board.
    (tmp_path / "device.pi/slow.toml").write_text(
        'deadline_s = 30.0\n[service]\nbundle = "/bundle"\nsource = "-"\nname = "pi"\nrate_hz = 2.0\n'
        '[tls]\nfolder = "/identity/tls"\n'
    )
    with bridge() as (server, device), ExitStack() as stack:
        board = Board.make(tmp_path / "root", qemu.root, "pi4", namespace=device)
        assert faces.FACES["pi4"].cpu == board.cpu
        edge = ("edge", str(bundle), "--listen", SERVER, "--tls", str(tmp_path / "edge.kitchen"), "--json")
        prefix = (IP, "netns", "exec", server)
        first = stack.enter_context(running(*edge, prefix=prefix))
        assert first.ready()["tls"] is True
        command = board.command(
            *("python3", "-m", "kinflow", "device", "--settings", "/identity/slow.toml"),
            binds={**sdk.binds, bundle: "/bundle", tmp_path / "device.pi": "/identity"},
            environment=sdk.environment,
        )
        # Not as a context: at its end that would flush frames which nobody reads any more.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.kill)
        answers = Answers(process, sample_images(1)[0].tobytes())
        found = answers.until(lambda answer: answer["tier"] == "edge")
        assert found["bytes_up"] > 0
        first.process.kill()
        alone = answers.until(lambda answer: answer["tier"] == "device")
        assert alone["degraded"]
        assert alone["reason"]
        second = stack.enter_context(running(*edge, prefix=prefix))
        second.ready()
        again = answers.until(lambda answer: answer["tier"] == "edge")
        assert not again["degraded"]
        assert again["label"] == found["label"]
        # Frames kept coming faster than the board could look at them.
        assert answers.said[-1]["stale"] > 0
        process.terminate()
        assert process.wait(60) in (0, -15)
