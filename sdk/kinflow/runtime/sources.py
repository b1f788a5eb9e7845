"""Where frames come from. What a source is, is written `kind` or `kind:where`; KINDS has them all.

Cameras and streams are read by a program that is on the board anyway (ffmpeg, gst-launch-1.0): it scales, and
writes raw frames to a pipe. Nothing is installed into Python for them.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np

from kinflow import children
from kinflow.errors import InputError, SettingsError, SourceError
from kinflow.images import STDIN, SUFFIXES, Item, fit, frames, read_image
from kinflow.logs import event
from kinflow.manifest import Preprocess
from kinflow.runtime import pipelines

log = logging.getLogger("kinflow.runtime")

KINDS = {
    "-": "raw frames of the family's size on standard input",
    "folder": "the pictures of a folder, once: folder:PATH",
    "watch": "pictures as they appear in a folder: watch:PATH",
    "v4l2": "a USB or CSI camera by ffmpeg: v4l2:/dev/video0",
    "stream": "a network camera or a film by ffmpeg: stream:rtsp://…",
    "picamera2": "a Raspberry Pi's camera by picamera2: picamera2:0",
    "jetson": "a Jetson's CSI camera by GStreamer: jetson:0",
}


class Source(Protocol):
    """Opened with `with`; `read` blocks until a frame is there."""

    live: bool
    """Frames come whether or not they are wanted: those that are not read in time are stale."""
    ended: bool
    """Nothing more will come."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def read(self) -> Item | None:
        """The next frame; None when there is none (now, or ever: `ended`). Raises SourceError, InputError."""


def parse(text: str, preprocess: Preprocess) -> Source:
    """Raises SettingsError for a kind that is not there, or lacks its `where`."""
    kind, _, where = text.partition(":")
    if kind == STDIN:
        # Not sys.stdin: a thread that waits in it makes the interpreter abort when it ends.
        return StreamSource(os.fdopen(os.dup(0), "rb", buffering=0), preprocess)
    if kind in ("folder", "watch"):
        return FolderSource(_needed(text, where), preprocess, watch=kind == "watch")
    if kind == "v4l2":
        return CommandSource(pipelines.v4l2(where or "/dev/video0", preprocess), preprocess)
    if kind == "stream":
        return CommandSource(pipelines.stream(_needed(text, where), preprocess), preprocess)
    if kind == "jetson":
        return CommandSource(pipelines.jetson(_index(text, where), preprocess), preprocess)
    if kind == "picamera2":
        return Picamera2Source(_index(text, where), preprocess)
    known = "\n".join(f"  {name}: {what}" for name, what in KINDS.items())
    raise SettingsError(f"the source is {text!r}, there are:\n{known}")


def _needed(text: str, where: str) -> str:
    if not where:
        raise SettingsError(f"the source is {text!r}: it needs a place, {KINDS[text.partition(':')[0]]}")
    return where


def _index(text: str, where: str) -> int:
    if where and not (where.isascii() and where.isdigit() and len(where) < 4):
        raise SettingsError(f"the source is {text!r}: behind the colon stands the camera's number, 0 without it")
    return int(where or 0)


class FolderSource:
    """The pictures of a folder by name, and with `watch` instead those that appear later. A bad one is skipped."""

    live = False

    def __init__(self, folder: str, preprocess: Preprocess, *, watch: bool) -> None:
        self._folder = Path(folder)
        self._preprocess = preprocess
        self._watching = watch
        self._waiting: list[Path] = []
        self._taken: set[Path] = set()
        self._sizes: dict[Path, int] = {}
        self.ended = False

    def __enter__(self) -> FolderSource:
        present = self._list()
        if self._watching:
            self._taken = set(present)
        elif present:
            self._waiting = sorted(present)
        else:
            raise SourceError(f"{self._folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = True

    def read(self) -> Item | None:
        if self._watching and not self._waiting:
            self._look()
        while self._waiting:
            file = self._waiting.pop(0)
            try:
                return Item(file.name, read_image(file, self._preprocess))
            except InputError as exc:
                event(log, logging.WARNING, "picture skipped", error=exc)
        self.ended = not self._watching
        return None

    def _look(self) -> None:
        """A file is taken once it has the same size twice: until then somebody may still be writing it."""
        present = self._list()
        self._taken &= present.keys()
        new = {file: size for file, size in sorted(present.items()) if file not in self._taken}
        self._waiting = [file for file, size in new.items() if self._sizes.get(file) == size]
        self._taken.update(self._waiting)
        self._sizes = new

    def _list(self) -> dict[Path, int]:
        try:
            files = [file for file in self._folder.iterdir() if file.suffix.lower() in SUFFIXES]
        except OSError as exc:
            raise SourceError(f"{self._folder}: {exc.strerror}") from exc
        sizes = {}
        for file in files:
            with suppress(OSError):  # gone meanwhile
                sizes[file] = file.stat().st_size
        return sizes


class StreamSource:
    """Raw frames from a file object that somebody else writes to. Its end is the source's."""

    live = True

    def __init__(self, stream: IO[bytes], preprocess: Preprocess) -> None:
        self._frames: Iterator[Item] = frames(stream, preprocess)
        self.ended = False

    def __enter__(self) -> StreamSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = True

    def read(self) -> Item | None:
        item = next(self._frames, None)
        self.ended = item is None
        return item


class CommandSource:
    """Frames that a program writes to its standard output. A program that ends is an error: a camera does not."""

    live = True

    def __init__(self, pipeline: pipelines.Pipeline, preprocess: Preprocess) -> None:
        self.pipeline = pipeline
        self._preprocess = preprocess
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: Iterator[Item] = iter(())
        self.ended = False

    def __enter__(self) -> CommandSource:
        command = self.pipeline.command
        if shutil.which(command[0]) is None:
            raise SourceError(f"{command[0]} is not installed: {self.pipeline.install}")
        self._process = children.spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stdout is not None
        # As the pipeline writes them; `read` makes the family's mode of it.
        written = Preprocess(
            self._preprocess.mode, self._preprocess.height, self._preprocess.width, [0.0], [1.0], "stretch"
        )
        self._frames = frames(self._process.stdout, written) if not self.pipeline.rgba else self._rgba()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            children.stop(self._process)

    def read(self) -> Item | None:
        try:
            item = next(self._frames, None)
        except InputError as exc:
            raise SourceError(f"{self.pipeline.command[0]} stopped within a frame: {self._last_words()}") from exc
        if item is None:
            raise SourceError(f"{self.pipeline.command[0]} ended: {self._last_words()}")
        return item

    def _rgba(self) -> Iterator[Item]:
        assert self._process is not None
        assert self._process.stdout is not None
        height, width = self._preprocess.height, self._preprocess.width
        size = height * width * 4
        index = 0
        while len(data := self._process.stdout.read(size)) == size:
            pixels = np.frombuffer(data, np.uint8).reshape(height, width, 4)[..., :3]
            yield Item(f"frame {index}", fit(np.ascontiguousarray(pixels), self._preprocess))
            index += 1

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        status = children.stop(self._process)
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"status {status}, without a word"


class Picamera2Source:
    """libcamera by Raspberry Pi's own package; it is a part of the system, not of PyPI's wheels."""

    live = True
    # A sensor's smallest modes are about this size; scaling down further is done here.
    _SIZE = (640, 480)

    def __init__(self, index: int, preprocess: Preprocess) -> None:
        self._index = index
        self._preprocess = preprocess
        self._camera: Any = None
        self._count = 0
        self.ended = False

    def __enter__(self) -> Picamera2Source:
        if find_spec("picamera2") is None:
            raise SourceError(
                "picamera2 is not there: apt install python3-picamera2, and an environment with "
                "--system-site-packages (devices/raspberrypi/install.sh makes one); or use v4l2:/dev/video0"
            )
        from picamera2 import Picamera2

        try:
            self._camera = Picamera2(self._index)
            # BGR888 is picamera2's name for arrays whose last axis is red, green, blue.
            main = {"size": self._SIZE, "format": "BGR888"}
            self._camera.configure(self._camera.create_video_configuration(main=main))
            self._camera.start()
        except Exception as exc:  # IndexError without a camera, RuntimeError while another program has it
            raise SourceError(f"camera {self._index} does not start: {exc!r}") from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = True
        if self._camera is not None:
            self._camera.stop()
            self._camera.close()

    def read(self) -> Item | None:
        if self.ended:
            return None
        try:
            pixels = self._camera.capture_array("main")
        except Exception as exc:
            raise SourceError(f"camera {self._index} gives no frame: {exc!r}") from exc
        self._count += 1
        return Item(f"frame {self._count - 1}", fit(np.ascontiguousarray(pixels), self._preprocess))
