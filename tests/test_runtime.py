"""What `kinflow device` does with frames: the newest is taken, answers go to every sink, systemd hears of it."""

from __future__ import annotations

import io
import json
import os
import socket
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
from kinflow.runtime import sources
from kinflow.runtime.notify import Notifier
from kinflow.runtime.report import Report
from kinflow.runtime.sampler import Sampler
from kinflow.runtime.service import Service
from kinflow.runtime.sinks import Lines
from kinflow.stopping import Stop
from kinflow.testing import FakeDevice, answer

GREY = Preprocess("L", 4, 4, [0.0], [1.0], "stretch")
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
        assert service.run(Stop(), limit=2).answers == 2
        broken.error = None
        service.run(Stop())
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
            counts = Service("porch", device, sampler, [], notifier=notifier).run(Stop())
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
            service.run(Stop())
    pipe.close()


def test_a_link_that_is_down_is_no_reason_to_end() -> None:
    """An MQTT sink without connection fails as a full disk does."""
    sink = Breaking()
    sink.error = LinkLost("not connected")
    with FakeDevice([answer()]) as device, Sampler(ListSource(1), 0) as sampler:
        assert Service("porch", device, sampler, [sink]).run(Stop()).answers == 1
