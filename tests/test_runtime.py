"""The runtime around a device: newest frames, paced; answers out; systemd told."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinflow.errors import InputError, LinkLost, SettingsError, SourceError
from kinflow.images import Item
from kinflow.manifest import Preprocess
from kinflow.runtime import pipelines, sources
from kinflow.runtime.notify import Notifier
from kinflow.runtime.report import Report
from kinflow.runtime.sampler import Sampler
from kinflow.runtime.service import Service
from kinflow.runtime.sinks import Lines
from kinflow.testing import FakeDevice, answer

GREY = Preprocess("L", 4, 4, [0.0], [1.0], "stretch")
COLOUR = Preprocess("RGB", 4, 6, [0.0] * 3, [1.0] * 3, "crop")
FRAME = 16


def picture(folder: Path, name: str, value: int = 0) -> None:
    Image.new("L", (4, 4), value).save(folder / name)


class PipeOfFrames:
    """A pipe that a test writes grey frames of one value to, as a camera's program would."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        self.source = sources.StreamSource(os.fdopen(reading, "rb"), GREY)

    def send(self, *values: int) -> None:
        os.write(self._writing, b"".join(bytes([value]) * FRAME for value in values))

    def close(self) -> None:
        os.close(self._writing)


def taken(sampler: Sampler, timeout_s: float = 10.0) -> int:
    """The value of the next frame."""
    item = sampler.take(timeout_s)
    assert item is not None
    return int(item.image[0, 0])


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


# Sampler


def test_only_the_newest_frame_is_kept() -> None:
    """What came while nobody looked is dropped and counted; the last one is there at once."""
    pipe = PipeOfFrames()
    with Sampler(pipe.source, 0) as sampler:
        pipe.send(1)
        assert taken(sampler) == 1
        pipe.send(*range(2, 10))
        until(lambda: sampler.stale == 7)
        assert taken(sampler) == 9
        assert sampler.take(0.05) is None
        assert not sampler.ended
        pipe.close()
        until(lambda: sampler.take(0.05) is None and sampler.ended)


def test_the_rate_is_kept_and_missed_ticks_are_not_made_up_for(tmp_path: Path) -> None:
    """At 20 a second five frames take at least four intervals; after a pause there is no burst."""
    for index in range(8):
        picture(tmp_path, f"{index}.png", index)
    with Sampler(sources.parse(f"folder:{tmp_path}", GREY), 20) as sampler:
        start = time.monotonic()
        assert [taken(sampler) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert time.monotonic() - start >= 4 / 20 - 0.001
        time.sleep(0.3)
        start = time.monotonic()
        assert [taken(sampler) for _ in range(3)] == [5, 6, 7]
        assert time.monotonic() - start >= 2 / 20 - 0.001
        assert sampler.take(1) is None
        assert sampler.ended


def test_half_a_frame_is_an_error_after_the_whole_ones() -> None:
    """The error of the reading thread comes out where frames are taken."""
    source = sources.StreamSource(io.BytesIO(bytes(FRAME + 3)), GREY)
    with Sampler(source, 0) as sampler:
        sampler.take(5)
        with pytest.raises(InputError, match="3 bytes of 16"):
            sampler.take(5)


# Sources


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


# Sinks, systemd, the loop


def report(label: str = "cat") -> Report:
    return Report("porch", "frame 1", 1_800_000_000.5, answer(label), None, 3)


def test_lines_survive_logrotate(tmp_path: Path) -> None:
    """A file that was moved away is made again; each line is one JSON object."""
    path = tmp_path / "answers.jsonl"
    with Lines(path) as sink:
        sink.write(report("cat"))
        path.rename(tmp_path / "answers.1")
        sink.write(report("dog"))
    (line,) = path.read_text().splitlines()
    said = json.loads(line)
    assert (said["label"], said["device"], said["stale"], said["temperature_c"]) == ("dog", "porch", 3, None)


def test_an_output_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    """A typo in the path is said at once."""
    with pytest.raises(SettingsError, match="absent"):
        Lines(tmp_path / "absent/answers.jsonl").__enter__()


def test_systemd_hears_of_it(tmp_path: Path) -> None:
    """A real datagram socket gets the protocol's lines, by path and in the abstract namespace."""
    for address, name in ((str(tmp_path / "notify"),) * 2, (f"\0kinflow-{os.getpid()}", f"@kinflow-{os.getpid()}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address)
            systemd.settimeout(10)
            with Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"}) as notifier:
                assert notifier.watchdog_s == 3.0
                notifier.send("READY=1", "STATUS=fine")
            assert systemd.recv(100) == b"READY=1\nSTATUS=fine"
            assert systemd.recv(100) == b"STOPPING=1"
    with Notifier({}) as silent:
        silent.send("READY=1")
        assert silent.watchdog_s is None


class ListSource:
    """Frames from a list."""

    live = False
    ended = False

    def __init__(self, count: int) -> None:
        self.left = count

    def __enter__(self) -> ListSource:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self) -> Item | None:
        self.left -= 1
        self.ended = self.left < 0
        return None if self.ended else Item(f"frame {self.left}", np.zeros((4, 4), np.uint8))


class Breaking:
    """A sink that fails as long as it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.written: list[Report] = []

    def __enter__(self) -> Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, report: Report) -> None:
        if self.error is not None:
            raise self.error
        self.written.append(report)


def test_a_failing_sink_stops_neither_the_device_nor_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk is said once and its end once; the other sink has every answer."""
    broken, whole = Breaking(), Breaking()
    broken.error = OSError(28, "No space left on device")
    device = FakeDevice(repeat(answer("cat")))
    source = ListSource(3)
    with device, Sampler(source, 0) as sampler:
        service = Service("porch", device, sampler, [broken, whole])
        assert service.run(threading.Event(), limit=2).answers == 2
        broken.error = None
        service.run(threading.Event())
    assert [len(broken.written), len(whole.written)] == [1, 3]
    said = [record.getMessage().split()[:2] for record in caplog.records]
    assert said == [["sink", "fails"], ["sink", "works"]]


def test_the_loop_counts_tiers_and_says_so_to_systemd(tmp_path: Path) -> None:
    """READY once it runs, then a watchdog message for each look, with the counts as status."""
    device = FakeDevice([answer("cat"), answer("cat", tier="edge")])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        with notifier, device, Sampler(ListSource(2), 0) as sampler:
            counts = Service("porch", device, sampler, [], notifier=notifier).run(threading.Event())
        said = [systemd.recv(200).decode() for _ in range(3)]
    assert counts.tiers == {"device": 1, "edge": 1}
    assert said[0].startswith("READY=1")
    assert said[2] == "WATCHDOG=1\nSTATUS=2 answers (device 1, edge 1), 0 frames stale"


def test_a_camera_that_goes_silent_is_an_error() -> None:
    """The service ends, so that it can be started again; a silent sink for MQTT would not be noticed."""
    pipe = PipeOfFrames()
    with FakeDevice(repeat(answer())) as device, Sampler(pipe.source, 0) as sampler:
        service = Service("porch", device, sampler, [], stall_s=0.2)
        with pytest.raises(SourceError, match="no frame for"):
            service.run(threading.Event())
    pipe.close()


def test_a_link_that_is_down_is_no_reason_to_end() -> None:
    """An MQTT sink without connection fails as a full disk does."""
    sink = Breaking()
    sink.error = LinkLost("not connected")
    with FakeDevice([answer()]) as device, Sampler(ListSource(1), 0) as sampler:
        assert Service("porch", device, sampler, [sink]).run(threading.Event()).answers == 1
