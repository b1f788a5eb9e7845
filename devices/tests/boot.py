"""A whole emulated machine: Debian's kernel and systemd, with the service as install.sh leaves it.

    make test-board-boot

Slower than the rest (minutes), so not one of `make test-devices`. It shows what user mode cannot: the unit's own
start, readiness, user and privileges, the watchdog, the stop. The machine is qemu's `virt`, not a Pi or a Jetson.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import Board
from PIL import Image

from conftest import DEVICES, QUICK, ROOT, Parts, compile_here
from system_fixtures import sample_images

BOOT_TIMEOUT_S = 900
IMAGE_MB = 1200

# Runs on the machine beside the service and tells the serial console what it finds.
PROBE = """#!/bin/sh
say() { echo "PROBE $*" >/dev/ttyAMA0; }
show() { systemctl show --property "$1" --value kinflow-device; }
until [ "$(show ActiveState)" = active ]; do sleep 1; done
pid=$(show MainPID)
say active
say user $(stat -c %U /proc/$pid)
say privileges $(sed -n 's/^NoNewPrivs:\\t//p' /proc/$pid/status) $(sed -n 's/^CapEff:\\t//p' /proc/$pid/status)
cp /photo.png /photos/new.png
until [ -s /var/lib/kinflow/answers.jsonl ]; do sleep 1; done
say answer $(cat /var/lib/kinflow/answers.jsonl)
say status $(show StatusText)
kill -STOP $pid
until [ "$(show NRestarts)" = 1 ] && [ "$(show ActiveState)" = active ]; do sleep 1; done
say restarted by the watchdog
systemctl stop kinflow-device
say stopped $(show Result)
systemctl poweroff --force
"""
PROBE_UNIT = """[Unit]
Description=Looks at kinflow-device
After=kinflow-device.service

[Service]
Type=simple
ExecStart=/probe

[Install]
WantedBy=multi-user.target
"""
# A watchdog for a processor that is fifty times slower, but short enough to be waited for.
DROP_IN = "[Service]\nWatchdogSec=60\nTimeoutStartSec=600\nMemoryHigh=infinity\n"


@pytest.fixture(scope="module")
def machine(qemu: Parts, wheels: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with the service installed by install.sh."""
    command = ["sh", str(DEVICES / "emulator/prepare.sh"), str(ROOT / ".cache/devices"), "machine"]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHON": sys.executable, "PATH": PATH}
    )
    folder = tmp_path_factory.mktemp("machine")
    board = Board.make(folder / "root", qemu.root.with_name("machine"), "pi4")
    words = (
        "sh",
        "/kinflow/devices/raspberrypi/install.sh",
        "--service",
        "--extras",
        "onnx,cli",
        "--wheels",
        "/wheels",
    )
    board.run(*words, binds={checkout: "/kinflow", wheels: "/wheels"}, environment=QUICK)
    compile_here(board.root / "opt/kinflow/venv/lib")
    root = board.root
    settings = root / "etc/kinflow/device.toml"
    text = settings.read_text().replace("v4l2:/dev/video0", "watch:/photos")
    settings.write_text(f"{text}output = '/var/lib/kinflow/answers.jsonl'\n")
    (root / "photos").mkdir()
    Image.fromarray(sample_images(1)[0]).save(root / "photo.png")
    (root / "probe").write_text(PROBE)
    (root / "probe").chmod(0o755)
    units = root / "etc/systemd/system"
    (units / "probe.service").write_text(PROBE_UNIT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/probe.service").symlink_to("../probe.service")
    (units / "kinflow-device.service.d/zz-slow.conf").write_text(DROP_IN)
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    # Faces of /proc and /sys are for user mode; here the kernel has its own.
    for name in ("proc", "sys"):
        shutil.rmtree(root / name)
        (root / name).mkdir()
    image = folder / "disk.img"
    make = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", str(root), str(image), f"{IMAGE_MB}M"]
    subprocess.run(make, check=True, env={"PATH": PATH})
    return image


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def boot(image: Path) -> str:
    """Everything the machine says until it is off."""
    cache = ROOT / ".cache/devices"
    kernel = next((cache / "kernel/boot").glob("vmlinuz-*"))
    append = "console=ttyAMA0 quiet systemd.show_status=0 panic=-1 systemd.log_target=console"
    command = [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-nographic"),
        *("-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(cache / "initrd.gz")),
        *("-append", append, "-drive", f"file={image},format=raw,if=none,id=disk"),
        *("-device", "virtio-blk-device,drive=disk"),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=BOOT_TIMEOUT_S
    )
    return done.stdout + done.stderr


def test_the_service_under_systemd(machine: Path) -> None:
    """Ready by its own word, as its own user without privileges; answers; restarted by the watchdog; stops cleanly."""
    said = boot(machine)
    print(said[-3000:])
    found = dict(re.findall(r"PROBE (\w+) ?(.*?)\r?\n", said))
    assert "active" in found, said[-3000:]
    assert found["user"] == "kinflow"
    assert found["privileges"] == "1 0000000000000000"
    assert '"label": "Ankle boot"' in found["answer"]
    assert "answers" in found["status"] or "waiting" in found["status"]
    assert "restarted" in found
    assert found["stopped"] == "success"
