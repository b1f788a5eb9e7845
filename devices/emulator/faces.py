"""The face of a board: the files of /proc and /sys that programs look at, as a tree below a folder.

Values as those boards' documentation and device trees have them. Only identity and sensors: no speed, no camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Face:
    """One board. `files` are beside those that every board has."""

    cpu: str
    """What qemu calls its processor."""
    model: str
    compatible: tuple[str, ...]
    cores: int
    max_khz: int
    min_khz: int
    zones: tuple[tuple[str, int, int | None], ...]
    """Thermal zones: type, millidegrees, passive trip point."""
    files: tuple[tuple[str, str], ...] = ()


FACES = {
    "pi4": Face(
        cpu="cortex-a72",
        model="Raspberry Pi 4 Model B Rev 1.4",
        compatible=("raspberrypi,4-model-b", "brcm,bcm2711"),
        cores=4,
        max_khz=1_800_000,
        min_khz=600_000,
        zones=(("cpu-thermal", 48_312, None),),
        files=(
            ("sys/devices/platform/soc/soc:firmware/get_throttled", "0\n"),
            ("sys/class/hwmon/hwmon0/name", "rpi_volt\n"),
            ("sys/class/hwmon/hwmon0/in0_lcrit_alarm", "0\n"),
        ),
    ),
    "jetson-nano": Face(
        cpu="cortex-a57",
        model="NVIDIA Jetson Nano Developer Kit",
        compatible=("nvidia,p3450-0000", "nvidia,jetson-nano", "nvidia,tegra210"),
        cores=4,
        max_khz=1_479_000,
        min_khz=102_000,
        zones=(
            ("AO-therm", 41_500, None),
            ("CPU-therm", 38_000, 97_000),
            ("GPU-therm", 36_500, 97_500),
            ("PMIC-Die", 100_000, None),
        ),
        files=(("sys/devices/gpu.0/load", "120\n"), ("etc/nv_tegra_release", "# R32 (release), REVISION: 7.1\n")),
    ),
    "jetson-orin": Face(
        cpu="max",
        model="NVIDIA Jetson Orin Nano Developer Kit",
        compatible=("nvidia,p3768-0000+p3767-0005", "nvidia,tegra234"),
        cores=6,
        max_khz=1_510_400,
        min_khz=115_200,
        zones=(("cpu-thermal", 48_500, 99_000), ("gpu-thermal", 47_300, 99_000), ("tj-thermal", 49_500, 99_000)),
        files=(
            ("sys/devices/platform/gpu.0/load", "35\n"),
            ("sys/class/hwmon/hwmon1/in1_label", "VDD_IN\n"),
            ("sys/class/hwmon/hwmon1/in1_input", "4960\n"),
            ("sys/class/hwmon/hwmon1/curr1_input", "1000\n"),
            ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"),
        ),
    ),
}


def write(root: Path, face: Face) -> None:
    """Write the tree below `root`. What is there is overwritten, nothing is removed."""
    for path, text in (*_every_board(face), *face.files):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _every_board(face: Face) -> list[tuple[str, str]]:
    cpu = "sys/devices/system/cpu"
    tree = "sys/firmware/devicetree/base"
    last = face.cores - 1
    files = [
        (f"{tree}/model", f"{face.model}\0"),
        (f"{tree}/compatible", "".join(f"{name}\0" for name in face.compatible)),
        ("proc/loadavg", "0.40 0.30 0.20 1/123 4567\n"),
        (f"{cpu}/kernel_max", "255\n"),
        *((f"{cpu}/{name}", f"0-{last}\n") for name in ("possible", "present", "online")),
    ]
    for core in range(face.cores):
        files += [
            (f"{cpu}/cpu{core}/cpufreq/cpuinfo_max_freq", f"{face.max_khz}\n"),
            (f"{cpu}/cpu{core}/cpufreq/cpuinfo_min_freq", f"{face.min_khz}\n"),
            (f"{cpu}/cpu{core}/cpufreq/scaling_max_freq", f"{face.max_khz}\n"),
            (f"{cpu}/cpu{core}/cpufreq/scaling_cur_freq", f"{face.min_khz}\n"),
            # onnxruntime 1.28 and newer dies at import where the topology does not fit the number of cores.
            (f"{cpu}/cpu{core}/topology/physical_package_id", "0\n"),
            (f"{cpu}/cpu{core}/topology/core_id", f"{core}\n"),
            (f"{cpu}/cpu{core}/topology/core_siblings_list", f"0-{last}\n"),
            (f"{cpu}/cpu{core}/topology/core_siblings", f"{(1 << face.cores) - 1:x}\n"),
            (f"{cpu}/cpu{core}/topology/cluster_cpus_list", f"0-{last}\n"),
            (f"{cpu}/cpu{core}/topology/thread_siblings_list", f"{core}\n"),
        ]
        for index, (level, kind, size, shared) in enumerate(
            ((1, "Data", "32K", core), (1, "Instruction", "48K", core), (2, "Unified", "1024K", f"0-{last}"))
        ):
            cache = f"{cpu}/cpu{core}/cache/index{index}"
            files += [
                (f"{cache}/level", f"{level}\n"),
                (f"{cache}/type", f"{kind}\n"),
                (f"{cache}/size", f"{size}\n"),
                (f"{cache}/shared_cpu_list", f"{shared}\n"),
                (f"{cache}/coherency_line_size", "64\n"),
            ]
    for number, (kind, milli_c, passive) in enumerate(face.zones):
        zone = f"sys/class/thermal/thermal_zone{number}"
        files += [(f"{zone}/type", f"{kind}\n"), (f"{zone}/temp", f"{milli_c}\n")]
        if passive is not None:
            files += [(f"{zone}/trip_point_0_type", "passive\n"), (f"{zone}/trip_point_0_temp", f"{passive}\n")]
    return files
