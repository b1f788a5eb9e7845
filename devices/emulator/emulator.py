"""An emulated arm64 board: a copy of the Debian root with a board's face, commands run in it by qemu's user mode.

A command gets the root as its own (chroot in a private mount namespace), the board's processor, and, if named, a
network namespace. Needs root on Linux; prepare.sh fetches the parts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import faces

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_NAME = "kinflow-aarch64"
# An ELF file of 64 bits, little-endian, executable or shared, for machine 183 (AArch64).
_MAGIC = rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

_ENTER = """
mount -t proc proc "$BOARD_ROOT/proc"
mount --rbind /dev "$BOARD_ROOT/dev"
for bind in $BOARD_BINDS; do
    mkdir -p "$BOARD_ROOT/${bind#*:}"
    mount --bind -o ro "${bind%%:*}" "$BOARD_ROOT/${bind#*:}"
done
unset BOARD_BINDS
root=$BOARD_ROOT
unset BOARD_ROOT
exec chroot "$root" "$@"
"""


_NO_COMPILING = """def compile_file(*args, **options):
    return False


compile_dir = compile_path = compile_file
"""


@contextmanager
def registered(qemu: Path) -> Iterator[None]:
    """The kernel starts aarch64 programs by `qemu` meanwhile. Flag F opens it now, so that it works in a chroot."""
    if not (_BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True)
    # What a run that was killed has left.
    for left in _BINFMT.glob(f"{_NAME}-*"):
        if not Path(f"/proc/{left.name.rpartition('-')[2]}").exists():
            left.write_bytes(b"-1")
    entry = _BINFMT / f"{_NAME}-{os.getpid()}"
    line = b":%s:M::%s:%s:%s:OCF" % (entry.name.encode(), _MAGIC, _MASK, str(qemu).encode())
    (_BINFMT / "register").write_bytes(line)
    try:
        yield
    finally:
        entry.write_bytes(b"-1")


@dataclass(frozen=True)
class Board:
    """One board; `root` is its own to change."""

    root: Path
    cpu: str
    namespace: str = ""
    """Its network; empty: this machine's."""

    @classmethod
    def make(cls, root: Path, base: Path, face: str, *, namespace: str = "") -> Board:
        """Copy the root `base` to `root` and give it a face."""
        shutil.copytree(base, root, symlinks=True)
        # /proc is mounted when a command runs; what a face says there is for readers of trees alone.
        faces.write(root, faces.FACES[face])
        # pip compiles what it installs, for minutes under emulation; what is to start quickly is compiled outside.
        (root / "usr/lib/python3.11/compileall.py").write_text(_NO_COMPILING)
        return cls(root, faces.FACES[face].cpu, namespace)

    def command(
        self, *words: str, binds: Mapping[Path, str] | None = None, environment: Mapping[str, str] | None = None
    ) -> list[str]:
        """What to start on this machine for a command on the board. `binds`: folders here -> there, read-only."""
        prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        mounts = " ".join(f"{here}:{there}" for here, there in (binds or {}).items())
        variables = {
            "PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "QEMU_CPU": self.cpu,
            "BOARD_ROOT": str(self.root),
            "BOARD_BINDS": mounts,
            **(environment or {}),
        }
        return [
            *prefix,
            *("unshare", "--mount", "--propagation", "private", "env", "-i"),
            *(f"{name}={value}" for name, value in variables.items()),
            *("sh", "-ec", _ENTER, "sh", *words),
        ]

    def run(
        self,
        *words: str,
        binds: Mapping[Path, str] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 1800.0,
    ) -> str:
        """Run a command to its end. Returns its standard output; raises AssertionError when it fails."""
        command = self.command(*words, binds=binds, environment=environment)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout
