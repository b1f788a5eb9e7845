"""What the SDK takes on a board: megabytes installed without Python itself, and resident while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import Board

from conftest import FAMILIES, ROOT, Parts, Sdk, install_on_this_machine

MEGABYTE = 1_000_000
LIMITS_MB = {"tflite-runtime": 100, "onnx": 175}
RSS_LIMIT_MB = 150

# Peak of a device that has answered a few frames, from its own /proc.
RUN = """
import sys
from pathlib import Path
import numpy as np
import kinflow
settings = kinflow.DeviceSettings(backend=sys.argv[2], offload=False)
with kinflow.Device.open(sys.argv[1], settings) as device:
    spec = device.family.preprocess
    shape = (spec.height, spec.width) if spec.mode == "L" else (spec.height, spec.width, 3)
    for _ in range(2):
        device.infer(np.full(shape, 128, np.uint8))
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak) * 1024)
"""


def family() -> Path:
    """imagenet_lite where it has been built, else the family that is there."""
    return next((path for path in FAMILIES if path.parent.name == "imagenet_lite"), ROOT / "families/fashion/bundle")


@pytest.mark.parametrize("runtime", LIMITS_MB)
def test_what_is_installed_is_small(runtime: str, parts: Parts, wheels: Path, tmp_path: Path) -> None:
    """Files of the aarch64 wheels that `pip install kinflow[…]` brings, without bytecode."""
    assert parts
    target = install_on_this_machine(tmp_path / "sdk", wheels, f"kinflow[{runtime}]", compiled=False)
    files = [path for path in target.rglob("*") if path.is_file() and path.suffix != ".pyc" and not path.is_symlink()]
    size_mb = sum(path.stat().st_size for path in files) / MEGABYTE
    print(f"\nfootprint: kinflow[{runtime}] for aarch64 takes {size_mb:.0f} MB, at most {LIMITS_MB[runtime]}")
    assert 10 < size_mb <= LIMITS_MB[runtime]


def test_a_running_device_is_small(pi: Board, sdk: Sdk) -> None:
    """Native memory is bounded; the emulated figure holds qemu's own besides, and is only reported."""
    bundle = family()
    backend = "onnx"
    here = subprocess.run(
        [sys.executable, "-c", RUN, str(bundle), backend], capture_output=True, text=True, check=True, timeout=300
    )
    there = pi.run(
        *("python3", "-c", RUN, "/bundle", backend),
        binds={**sdk.binds, bundle: "/bundle"},
        environment=sdk.environment,
    )
    native_mb, emulated_mb = (int(said.split()[-1]) / MEGABYTE for said in (here.stdout, there))
    print("\nfootprint: " + json.dumps({"family": bundle.parent.name, "native": native_mb, "emulated": emulated_mb}))
    assert native_mb <= RSS_LIMIT_MB
