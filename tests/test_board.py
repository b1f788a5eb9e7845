"""What boards say of themselves, read from trees as their kernels show them, and what follows from it."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import faces
import pytest

from kinflow.board import BoardState, BoardWatch, judge, read_state, tegrastats, throttled, watch
from kinflow.errors import InputError

ORIN = (
    "11-24-2026 10:00:00 RAM 2448/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [12%@1510,6%@1510,off,0%@729,off,100%@1510] GR3D_FREQ 37% cpu@48.562C soc2@47.343C tj@49.5C gpu@-256C "
    "VDD_IN 4940mW/4940mW VDD_CPU_GPU_CV 1024mW/1000mW VDD_SOC 1421mW/1421mW"
)
NANO = (
    "RAM 1903/3964MB (lfb 25x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [20%@1479,off,15%@1479,3%@1479] EMC_FREQ 0% GR3D_FREQ 99% PLL@38C CPU@41.5C PMIC@100C GPU@39C AO@45.5C "
    "thermal@40.25C POM_5V_IN 2532/2532 POM_5V_GPU 0/0 POM_5V_CPU 410/410"
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A Raspberry Pi 4 at ease."""
    faces.write(tmp_path, faces.FACES["pi4"])
    return tmp_path


def test_a_pi_at_ease(tree: Path) -> None:
    """Model, cores, heat, load and the firmware's word."""
    state = read_state(tree)
    assert state.kind == "raspberrypi"
    assert state.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert (state.cores, state.temperature_c, state.limit_c) == (4, 48.312, 80.0)
    assert state.load == pytest.approx(0.1)
    assert state.throttled == throttled.Throttled()
    assert state.frequency_cap == 1.0
    assert judge(state).share == 0.0


@pytest.mark.parametrize(
    ("face", "hottest", "limit", "gpu", "power"),
    [("jetson-nano", 38.0, 97.0, 0.12, None), ("jetson-orin", 49.5, 99.0, 0.035, 4.96)],
)
def test_a_jetson(tmp_path: Path, face: str, hottest: float, limit: float, gpu: float, power: float | None) -> None:
    """The power chip's zone, which always says 100 °C, is not the processor's heat."""
    faces.write(tmp_path, faces.FACES[face])
    state = read_state(tmp_path)
    assert state.kind == "jetson"
    assert (state.temperature_c, state.limit_c) == (hottest, limit)
    assert state.gpu_load == pytest.approx(gpu)
    assert state.power_w == (None if power is None else pytest.approx(power))
    assert state.throttled is None


def test_this_machine_can_be_read_too() -> None:
    """A machine that is no board says what it has, and nothing is made up."""
    state = read_state()
    assert state.kind in ("other", "raspberrypi", "jetson")
    assert state.cores >= 1
    assert state.load is not None


def test_an_empty_or_broken_tree_says_nothing(tmp_path: Path) -> None:
    """A sensor that is missing or speaks nonsense is None, never an error."""
    assert read_state(tmp_path).temperature_c is None
    faces.write(tmp_path, faces.FACES["pi4"])
    for path in ("sys/class/thermal/thermal_zone0/temp", "proc/loadavg", faces.FACES["pi4"].files[0][0]):
        (tmp_path / path).write_bytes(b"\xff\xfeN/A\n")
    state = read_state(tmp_path)
    assert (state.temperature_c, state.load, state.throttled) == (None, None, None)


def test_a_battery_is_read(tree: Path) -> None:
    """Capacity and whether it is being used up; a mains supply beside it does not count."""
    supply = tree / "sys/class/power_supply"
    for name, files in {
        "ac": {"type": "Mains", "online": "0"},
        "bat0": {"type": "Battery", "capacity": "37", "status": "Discharging"},
    }.items():
        (supply / name).mkdir(parents=True)
        for file, text in files.items():
            (supply / name / file).write_text(f"{text}\n")
    state = read_state(tree)
    assert (state.battery, state.on_battery) == (0.37, True)


def test_cores_that_are_off_do_not_count(tree: Path) -> None:
    """Load is per core that runs."""
    (tree / "sys/devices/system/cpu/online").write_text("0,2-3\n")
    assert read_state(tree).cores == 3


@pytest.mark.parametrize(
    ("text", "now", "since_boot"),
    [
        ("throttled=0x0", (), ()),
        ("throttled=0x50005\n", ("undervoltage", "throttled"), ("undervoltage", "throttled")),
        ("80008", ("soft temperature limit",), ("soft temperature limit",)),
        ("0x20000", (), ("frequency capped",)),
    ],
)
def test_throttled_bits(text: str, now: tuple[str, ...], since_boot: tuple[str, ...]) -> None:
    """Bits 0 to 3 hold now, 16 to 19 since the boot, in both spellings."""
    assert throttled.parse(text) == throttled.Throttled(now, since_boot)


@pytest.mark.parametrize("text", ["", "throttled=", "VCHI initialization failed", "0x123456789"])
def test_no_throttled_bits(text: str) -> None:
    """What is no number is refused with what was said."""
    with pytest.raises(InputError, match="get_throttled"):
        throttled.parse(text)


def test_tegrastats_of_an_orin() -> None:
    """Cores that are off are left out, as is a sensor that says -256C."""
    said = tegrastats.parse(ORIN)
    assert (said.ram_used_mb, said.ram_total_mb, said.gpu_load) == (2448, 7620, 0.37)
    assert said.cpu_loads == (0.12, 0.06, 0.0, 1.0)
    assert said.temperatures_c == {"cpu": 48.562, "soc2": 47.343, "tj": 49.5}
    assert said.power_mw == {"VDD_IN": 4940, "VDD_CPU_GPU_CV": 1024, "VDD_SOC": 1421}


def test_tegrastats_of_a_nano() -> None:
    """JetPack 4 wrote rails without units, and RAM must not be taken for one."""
    said = tegrastats.parse(NANO)
    assert said.power_mw == {"POM_5V_IN": 2532, "POM_5V_GPU": 0, "POM_5V_CPU": 410}
    assert said.temperatures_c["CPU"] == 41.5
    assert said.gpu_load == 0.99


def test_another_line_is_no_tegrastats() -> None:
    """An error message is not taken for a board without sensors."""
    with pytest.raises(InputError, match="no line of tegrastats"):
        tegrastats.parse("tegrastats: permission denied")


def state_at(**overrides: object) -> BoardState:
    at_ease = BoardState("Raspberry Pi 4", "raspberrypi", 4, 50.0, 80.0, 0.2)
    return replace(at_ease, **overrides)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "share", "words"),
    [
        (state_at(), 0.0, ""),
        (state_at(temperature_c=70.0), 0.0, ""),
        (state_at(temperature_c=75.0), 0.5, "75 °C of 80"),
        (state_at(temperature_c=90.0), 1.0, "90 °C"),
        (state_at(load=1.5), 0.5, "1.5 tasks"),
        (state_at(load=9.0, temperature_c=75.0), 1.0, "9.0 tasks"),
        (state_at(throttled=throttled.Throttled(now=("undervoltage",))), 1.0, "undervoltage"),
        (state_at(throttled=throttled.Throttled(since_boot=("undervoltage",))), 0.0, ""),
        (state_at(temperature_c=None, load=None), 0.0, ""),
    ],
)
def test_strain(state: BoardState, share: float, words: str) -> None:
    """The worst of heat, load and throttling, with its reason; what was before does not count."""
    strain = judge(state)
    assert strain.share == pytest.approx(share)
    assert words in strain.reason
    assert bool(strain.reason) == (share > 0)


def test_the_watch_notices_heat(tree: Path) -> None:
    """A board that heats up is seen within a few intervals, and again when it has cooled down."""
    sensor = tree / "sys/class/thermal/thermal_zone0/temp"
    with BoardWatch(root=tree, interval_s=0.01) as board:
        assert board().share == 0.0
        for milli_c, strained in ((85_000, True), (45_000, False)):
            sensor.write_text(f"{milli_c}\n")
            give_up_s = time.monotonic() + 10
            while board.state.temperature_c != milli_c / 1000 or (board().share > 0) != strained:
                assert time.monotonic() < give_up_s
                time.sleep(0.01)


def test_the_firmware_is_asked_where_the_kernel_does_not_tell(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program called vcgencmd on the PATH is run, and its failure is not the watch's."""
    (tree / faces.FACES["pi4"].files[0][0]).unlink()
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x4\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    with BoardWatch(root=tree, interval_s=0.01) as board:
        give_up_s = time.monotonic() + 20
        while board().share < 1:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        assert "throttled" in board().reason
    assert watch.ask_firmware("/bin/false") is None
    assert watch.ask_firmware(str(folder / "absent")) is None


def test_tegrastats_completes_what_the_kernel_does_not_tell() -> None:
    """Heat of the processors alone, GPU load, the module's power; what the kernel's files say stays."""
    bare = replace(state_at(temperature_c=None), gpu_load=None, power_w=None)
    orin = tegrastats.completed(bare, tegrastats.parse(ORIN))
    assert (orin.temperature_c, orin.gpu_load, orin.power_w) == (49.5, 0.37, 4.94)
    nano = tegrastats.completed(bare, tegrastats.parse(NANO))
    assert (nano.temperature_c, nano.gpu_load, nano.power_w) == (41.5, 0.99, 2.532)
    told = replace(bare, temperature_c=60.0, gpu_load=0.1, power_w=9.0)
    assert tegrastats.completed(told, tegrastats.parse(ORIN)) == told


def test_the_watch_of_a_jetson_reads_tegrastats(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running program's lines reach state and strain where no sensor is a file, and it ends with the watch."""
    faces.write(tmp_path, faces.FACES["jetson-orin"])
    shutil.rmtree(tmp_path / "sys/class/thermal")
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "tegrastats"
    line = ORIN.replace("tj@49.5C", "tj@79.5C")
    program.write_text(f"#!/bin/sh\necho $$ >{folder}/pid\necho garbage\nwhile :; do echo '{line}'; sleep 0.1; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    with BoardWatch(root=tmp_path, interval_s=0.01) as board:
        give_up_s = time.monotonic() + 20
        while board().share == 0:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
        assert "80 °C" in board().reason or "79 °C" in board().reason
        assert board.state.temperature_c == 79.5
    assert not Path(f"/proc/{(folder / 'pid').read_text().strip()}").exists()
