"""Where the frames of `kinflow device` come from: folders, programs, cameras."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinflow.errors import SettingsError, SourceError
from kinflow.manifest import Preprocess
from kinflow.runtime import pipelines, sources

GREY = Preprocess("L", 4, 4, [0.0], [1.0], "stretch")
COLOUR = Preprocess("RGB", 4, 6, [0.0] * 3, [1.0] * 3, "crop")


def picture(folder: Path, name: str, value: int = 0) -> None:
    Image.new("L", (4, 4), value).save(folder / name)


def test_a_folder_is_read_by_name_and_bad_pictures_are_skipped(tmp_path: Path) -> None:
    """Once through, then it has ended."""
    picture(tmp_path, "b.png", 2)
    picture(tmp_path, "a.png", 1)
    (tmp_path / "ab.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    with sources.parse(f"folder:{tmp_path}", GREY) as source:
        assert [source.read().name for _ in range(2)] == ["a.png", "b.png"]
        assert source.read() is None
        assert source.ended


def test_a_watched_folder_gives_whole_new_pictures(tmp_path: Path) -> None:
    """Old ones are not looked at, half-written ones only once they have stopped growing, each once."""
    picture(tmp_path, "old.png", 1)
    stream = io.BytesIO()
    Image.new("L", (4, 4), 7).save(stream, "PNG")
    with sources.parse(f"watch:{tmp_path}", GREY) as source:
        assert source.read() is None
        with (tmp_path / "new.png").open("wb") as file:
            for part in (stream.getvalue()[:20], stream.getvalue()[20:]):
                file.write(part)
                file.flush()
                assert source.read() is None
        item = source.read()
        assert item is not None
        assert (item.name, int(item.image[0, 0])) == ("new.png", 7)
        assert [source.read(), source.read()] == [None, None]
        (tmp_path / "new.png").unlink()
        assert source.read() is None
        picture(tmp_path, "new.png", 8)
        assert source.read() is None
        again = source.read()
        assert again is not None
        assert int(again.image[0, 0]) == 8
        assert not source.ended


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("webcam", "picamera2"),
        ("folder:", "folder:PATH"),
        ("stream", "stream:rtsp"),
        ("jetson:left", "camera's number"),
        ("picamera2:-1", "camera's number"),
    ],
)
def test_a_wrong_source_is_explained(text: str, words: str) -> None:
    """The kinds are listed, or what is missing behind the colon."""
    with pytest.raises(SettingsError, match=words):
        sources.parse(text, GREY)


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    """Said when it is opened, not at some later frame."""
    for folder, words in ((tmp_path / "absent", "No such file"), (tmp_path, "no picture")):
        with pytest.raises(SourceError, match=words):
            sources.parse(f"folder:{folder}", GREY).__enter__()


def test_ffmpeg_scales_or_cuts_as_the_family_wants() -> None:
    """The command line for a camera and a network stream."""
    camera = pipelines.v4l2("/dev/video2", GREY).command
    assert camera[camera.index("-f") + 1] == "v4l2"
    assert camera[camera.index("-i") + 1] == "/dev/video2"
    assert "scale=4:4" in camera
    assert "gray" in camera
    stream = pipelines.stream("rtsp://192.0.2.7/live", COLOUR).command
    assert "scale=6:4:force_original_aspect_ratio=increase,crop=6:4" in stream
    assert stream[stream.index("-rtsp_transport") + 1] == "tcp"
    assert "rgb24" in stream


def test_the_jetson_cuts_the_middle_out() -> None:
    """6 to 4 of 1280x720 is 1080x720, a hundred pixels off each side; nothing is cut for stretching."""
    command = pipelines.jetson(1, COLOUR).command
    assert {"left=100", "right=1180", "top=0", "bottom=720", "sensor-id=1"} <= set(command)
    assert "video/x-raw,width=6,height=4,format=RGBA" in command
    assert not any(word.startswith("left=") for word in pipelines.jetson(0, GREY).command)


def command_source(script: str, *, rgba: bool = False, preprocess: Preprocess = GREY) -> sources.CommandSource:
    command = (sys.executable, "-c", f"import os, sys, time\nout = sys.stdout.buffer\n{script}")
    return sources.CommandSource(pipelines.Pipeline(command, "nothing to install", rgba), preprocess)


def test_a_programs_frames_are_read_and_it_ends_with_the_source() -> None:
    """A real process writes frames for ever; leaving the source stops it."""
    with command_source("while True: out.write(bytes(range(16))); out.flush()") as source:
        item = source.read()
        assert item is not None
        assert item.image.tolist() == np.arange(16).reshape(4, 4).tolist()
        process = source._process
    assert process is not None
    assert process.poll() is not None


def test_rgba_frames_become_the_familys_mode() -> None:
    """Alpha is dropped; grey families get grey."""
    script = "out.write(bytes([255, 0, 0, 9]) * 24); out.flush(); time.sleep(60)"
    with command_source(script, rgba=True, preprocess=COLOUR) as source:
        item = source.read()
        assert item is not None
        assert item.image.shape == (4, 6, 3)
        assert item.image[0, 0].tolist() == [255, 0, 0]
    with command_source("out.write(bytes([255, 0, 0, 9]) * 16); time.sleep(60)", rgba=True) as source:
        pass


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sys.exit('no such camera')", "ended: no such camera"),
        ("out.write(bytes(20)); sys.exit('cable pulled')", "within a frame: cable pulled"),
        ("sys.exit(3)", "status 3"),
    ],
)
def test_a_program_that_ends_is_an_error_with_its_last_words(script: str, words: str) -> None:
    """A camera does not end: the service has to be started again."""
    with command_source(script) as source:
        if "20" in script:
            assert source.read() is not None
        with pytest.raises(SourceError, match=words):
            source.read()


def test_a_missing_program_is_named_with_its_package() -> None:
    """ffmpeg is not a dependency of kinflow."""
    source = sources.CommandSource(pipelines.Pipeline(("no-such-program",), "apt install it"), GREY)
    with pytest.raises(SourceError, match="no-such-program is not installed: apt install it"):
        source.__enter__()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_delivers_a_films_frames(tmp_path: Path) -> None:
    """A real film, half red, half blue, is scaled to the family's size; its end is an error, as a camera's is."""
    film = tmp_path / "film.mkv"
    colours = ("color=red:s=48x32:r=5:d=1", "color=blue:s=48x32:r=5:d=1")
    inputs = [word for colour in colours for word in ("-f", "lavfi", "-i", colour)]
    make = ["ffmpeg", "-nostdin", "-loglevel", "error", *inputs, "-filter_complex", "hstack", "-c:v", "ffv1", str(film)]
    subprocess.run(make, check=True, timeout=120)
    with sources.parse(f"stream:{film}", Preprocess("RGB", 4, 12, [0.0] * 3, [1.0] * 3, "stretch")) as source:
        items = [source.read() for _ in range(5)]
        with pytest.raises(SourceError, match="ffmpeg ended"):
            source.read()
    image = items[0].image.astype(int)
    assert image.shape == (4, 12, 3)
    assert image[0, 1, 0] > 200 > 60 > image[0, 1, 2]
    assert image[0, 10, 2] > 200 > 60 > image[0, 10, 0]


PICAMERA2 = """
import numpy as np
class Picamera2:
    def __init__(self, number):
        if number > 0:
            raise IndexError("list index out of range")
    def create_video_configuration(self, main):
        return main
    def configure(self, main):
        assert main["format"] == "BGR888"
        self.size = main["size"]
    def start(self): self.frames = 0
    def capture_array(self, name):
        self.frames += 1
        if self.frames > 2:
            raise RuntimeError("camera timed out")
        pixels = np.zeros((self.size[1], self.size[0], 3), np.uint8)
        pixels[..., 0] = 255
        return pixels
    def stop(self): pass
    def close(self): pass
"""


def test_picamera2_is_used_as_its_manual_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in module with the real one's calls: red stays red, and its errors become ours."""
    with pytest.raises(SourceError, match="python3-picamera2"):
        sources.parse("picamera2", COLOUR).__enter__()
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    monkeypatch.syspath_prepend(str(tmp_path))
    with sources.parse("picamera2:0", COLOUR) as source:
        item = source.read()
        assert item is not None
        assert item.image.shape == (4, 6, 3)
        assert item.image[0, 0].tolist() == [255, 0, 0]
        source.read()
        with pytest.raises(SourceError, match="camera timed out"):
            source.read()
    with pytest.raises(SourceError, match="camera 3 does not start"):
        sources.parse("picamera2:3", COLOUR).__enter__()
