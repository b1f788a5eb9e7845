"""What /proc and /sys say of the board. `root` is "/" on a board and a recorded tree in tests.

Paths as in the kernel's documentation (thermal sysfs-api, cpufreq, power-supply class, /proc/loadavg), in
Raspberry Pi's firmware driver (get_throttled) and in NVIDIA's Jetson guide (gpu load, INA3221).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kinflow.board import throttled
from kinflow.errors import InputError

Kind = Literal["raspberrypi", "jetson", "other"]

# Where a board does not tell: a Pi 4 and 5 slow down from 80 °C on.
DEFAULT_LIMIT_C = 80.0
_SYSFS_THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
_GPU_LOADS = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
)


@dataclass(frozen=True)
class BoardState:
    """Whatever is None is not readable here."""

    model: str
    kind: Kind
    cores: int
    temperature_c: float | None
    """The hottest processor sensor."""
    limit_c: float
    """Where the kernel begins to slow the processor down."""
    load: float | None
    """Runnable tasks per core over the last minute: 1.0 is full."""
    gpu_load: float | None = None
    """0 to 1."""
    frequency_cap: float | None = None
    """Highest clock allowed now / highest the processor has."""
    throttled: throttled.Throttled | None = None
    battery: float | None = None
    """0 to 1."""
    on_battery: bool | None = None
    power_w: float | None = None
    """What the whole module takes."""


def read_state(root: Path = Path("/")) -> BoardState:
    """Never raises: a sensor that is missing or says nonsense is None."""
    model = _text(root / "sys/firmware/devicetree/base/model").strip("\0 \n")
    cores = _cores(root)
    temperature_c, limit_c = _thermal(root)
    battery, on_battery = _power_supply(root)
    gpu = _first_number(root, _GPU_LOADS)
    return BoardState(
        model=model or "unknown board",
        kind=_kind(root, model),
        cores=cores,
        temperature_c=temperature_c,
        limit_c=limit_c,
        load=_load(root, cores),
        gpu_load=None if gpu is None else gpu / 1000,
        frequency_cap=_frequency_cap(root),
        throttled=_throttled(root),
        battery=battery,
        on_battery=on_battery,
        power_w=_module_power_w(root),
    )


def _kind(root: Path, model: str) -> Kind:
    if model.startswith("Raspberry Pi"):
        return "raspberrypi"
    if "Jetson" in model or (root / "etc/nv_tegra_release").is_file():
        return "jetson"
    return "other"


def _cores(root: Path) -> int:
    """From a list such as `0-3` or `0,2-3`."""
    count = 0
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", _text(root / "sys/devices/system/cpu/online")):
        count += int(high or low) - int(low) + 1
    return max(count, 1)


def _thermal(root: Path) -> tuple[float | None, float]:
    """(hottest processor sensor, lowest passive trip point of the same zone)."""
    hottest: float | None = None
    limit_c = DEFAULT_LIMIT_C
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind = _text(zone / "type").strip().lower()
        # A Jetson also has zones of its power chip and of the memory; wifi and battery zones say nothing here.
        if not any(word in kind for word in ("cpu", "gpu", "soc", "tj", "x86_pkg")):
            continue
        milli = _number(zone / "temp")
        if milli is None or milli <= 0 or (hottest is not None and milli / 1000 <= hottest):
            continue
        hottest = milli / 1000
        trips = [
            number / 1000
            for trip in zone.glob("trip_point_*_type")
            if _text(trip).strip() == "passive" and (number := _number(zone / trip.name.replace("type", "temp")))
        ]
        limit_c = min(trips, default=DEFAULT_LIMIT_C)
    return hottest, limit_c


def _load(root: Path, cores: int) -> float | None:
    first = _text(root / "proc/loadavg").split(" ")[0]
    try:
        return float(first) / cores
    except ValueError:
        return None


def _frequency_cap(root: Path) -> float | None:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    allowed, highest = _number(folder / "scaling_max_freq"), _number(folder / "cpuinfo_max_freq")
    return allowed / highest if allowed and highest else None


def _throttled(root: Path) -> throttled.Throttled | None:
    text = _text(root / _SYSFS_THROTTLED)
    try:
        return throttled.parse(text) if text else None
    except InputError:
        return None


def _power_supply(root: Path) -> tuple[float | None, bool | None]:
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(supply / "type").strip() == "Battery":
            capacity = _number(supply / "capacity")
            status = _text(supply / "status").strip()
            return None if capacity is None else capacity / 100, status == "Discharging" if status else None
    return None, None


def _module_power_w(root: Path) -> float | None:
    """VDD_IN of a Jetson's INA3221: channel n is in<n>_label, in<n>_input (mV) and curr<n>_input (mA)."""
    for label in (root / "sys/class/hwmon").glob("hwmon*/in*_label"):
        if _text(label).strip() == "VDD_IN":
            channel = label.name[len("in") : -len("_label")]
            milli_v = _number(label.with_name(f"in{channel}_input"))
            milli_a = _number(label.with_name(f"curr{channel}_input"))
            if milli_v is not None and milli_a is not None:
                return milli_v * milli_a / 1e6
    return None


def _first_number(root: Path, paths: tuple[str, ...]) -> int | None:
    return next((number for path in paths if (number := _number(root / path)) is not None), None)


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    """Empty where it cannot be read: drivers come and go, and some sensors answer with an error while asleep."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
