"""What tests of whole servers need: a family of one's own, child processes that all end, and what was left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kinflow import idx
from kinflow.bundle import MANIFEST
from kinflow.family import INPUT, Family, Member

LOOPBACK = "127.0.0.1"
FASHION = Path(__file__).resolve().parents[1] / "families/fashion"
# Options of its network, as small as they can be.
NARROW = {"width": 8, "blocks": 1, "s1": 2, "edge_width": 8, "edge_blocks": 1, "cloud_width": 12, "cloud_blocks": 1}
SAMPLES = FASHION / "samples/images-idx3-ubyte.gz"
TAG = "KINFLOW_TEST_TAG"

Images = npt.NDArray[np.uint8]


def sample_images(count: int = 1000) -> Images:
    """The first of the committed images, uint8 [count, 28, 28]."""
    return idx.read(SAMPLES, axes=3)[:count]


def copy_bundle(
    folder: Path, *, family: str = "", version: str = "", thresholds: dict[str, float] | None = None
) -> Path:
    """The committed bundle under an id that nobody else on this machine announces, with other thresholds.

    A threshold of 1 at an exit sends everything on; an exit that is not named keeps its own.
    """
    shutil.copytree(FASHION / "bundle", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["id"] = family or f"test-{os.urandom(6).hex()}"
    manifest["version"] = version or manifest["version"]
    for name, threshold in (thresholds or {}).items():
        manifest["exits"][name]["threshold"] = threshold
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def member_answer(
    family: Family, member: str, image: Images, codecs: dict[str, str] | None = None
) -> tuple[int, float]:
    """(label, confidence) of a member on one image, computed here, features coded at every split on the way.

    `codecs` by split; without one, the split's default.
    """
    from kinflow.confidence import read
    from kinflow.preprocess import Preprocessor

    arrived = {INPUT: Preprocessor(family.preprocess)(image)}
    for name in family.manifest.members:
        source = family.manifest.segments[family.manifest.members[name].segments[-1]].source
        output = _member(family, name, source).run(arrived[source])
        if name == member:
            reading = read(output.logits[0], family.manifest.exits[output.exit].temperature)
            return reading.label, reading.confidence
        if output.split is not None:
            assert output.features is not None
            codec = family.codec(output.split, (codecs or {}).get(output.split, ""))
            arrived[output.split] = codec.decode(codec.encode(output.features[0]))[None]
    raise AssertionError(f"{member} is no member")


def _member(family: Family, name: str, source: str) -> Member:
    """Opened once for each bundle: opening costs more than running."""
    key = (str(family.path), name, source)
    if key not in _members:
        _members[key] = family.member(name, source=source)
    return _members[key]


_members: dict[tuple[str, str, str], Member] = {}


def halving_threshold(count: int) -> float:
    """The edge exit's threshold that sends half of the first `count` committed images on to the cloud."""
    family = Family.load(FASHION / "bundle")
    confidences = sorted(member_answer(family, "edge", image)[1] for image in sample_images(count))
    return (confidences[count // 2 - 1] + confidences[count // 2]) / 2


# Processes


def alive(pid: int) -> bool:
    """It runs; one that ended and waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def tagged(tag: str) -> list[int]:
    """Every process that inherited this tag, whoever is its parent now."""
    mark = f"{TAG}={tag}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


@dataclass
class Running:
    """A command, its output by lines, and every process it starts."""

    process: subprocess.Popen[str]
    tag: str
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    def line(self, pattern: str, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait for a line on either stream that the pattern is found in."""
        give_up_s = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            if ended:
                self._finish_reading()
            for line in (*self.out, *self.err):
                if match := re.search(pattern, line):
                    return match
            assert not ended, f"ended with {self.process.returncode} before {pattern!r}: {self.err[-5:]}"
            assert time.monotonic() < give_up_s, f"no line {pattern!r}: {self.out[-5:]} {self.err[-5:]}"
            time.sleep(0.02)

    def ready(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first line of a server with --json."""
        said: dict[str, Any] = json.loads(self.line(r'^\{"event": "ready".*', timeout_s)[0])
        return said

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit status; its output is complete then."""
        status = self.process.wait(timeout_s)
        self._finish_reading()
        return status

    def _finish_reading(self) -> None:
        for reader in self.readers:
            reader.join(5)

    def gone(self, timeout_s: float = 10.0) -> bool:
        """Whether every process of it ends within the time."""
        give_up_s = time.monotonic() + timeout_s
        while tagged(self.tag):
            if time.monotonic() > give_up_s:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def running(*command: str, cwd: Path | None = None, prefix: tuple[str, ...] = ()) -> Iterator[Running]:
    """`kinflow COMMAND` as a process of its own; whatever of it is still there at the end is killed."""
    tag = os.urandom(8).hex()
    # What a killed server leaves there goes with the test.
    folder = tempfile.TemporaryDirectory(prefix="kinflow-test-", ignore_cleanup_errors=True)
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "kinflow", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, TAG: tag, "TMPDIR": folder.name, "COLUMNS": "200"},
        # A shell that started the tests in the background lets them ignore Ctrl-C, and children inherit that.
        preexec_fn=heed_ctrl_c,
    )
    run = Running(process, tag)
    assert process.stdout is not None
    assert process.stderr is not None
    for stream, lines in ((process.stdout, run.out), (process.stderr, run.err)):
        reader = threading.Thread(target=_read, args=(stream, lines), daemon=True)
        reader.start()
        run.readers.append(reader)
    try:
        yield run
    finally:
        kill_tagged(tag)
        process.wait(10)
        run._finish_reading()
        process.stdout.close()
        process.stderr.close()
        folder.cleanup()


def heed_ctrl_c() -> None:
    """In a child: a shell that runs the tests in the background lets them ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))


def kill_tagged(tag: str) -> None:
    for pid in tagged(tag):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def silent_broker() -> Iterator[str]:
    """`host:port` of something that accepts connections and never says a word."""
    stop = threading.Event()
    accepted: list[socket.socket] = []
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(0.05)

        def accept() -> None:
            while not stop.is_set():
                with suppress(TimeoutError):
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"{LOOPBACK}:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()
            for each in accepted:
                each.close()
