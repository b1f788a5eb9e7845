"""A wall clock that jumps, for single processes; and the proof that it did.

A library loaded before the C library's own adds as many seconds as a file says. Monotonic clocks are left alone, as
when somebody sets a machine's time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.request import urlopen

from kinflow.errors import KinflowError
from kinflow.fleet import ServerProcess

SOURCE = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long off(void) {
    long seconds = 0;
    FILE *file = fopen(JUMP, "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    long done = syscall(SYS_clock_gettime, id, now);
    if (!done && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += off();
    return done;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""
# How exactly a jump is read off: an HTTP date has whole seconds, and the machine may be busy.
TOLERANCE_S = 60.0


class Unavailable(KinflowError):
    """This machine lacks what a fault needs."""


class FalseClock:
    """`environment` is for the processes that are to believe it."""

    def __init__(self, folder: Path) -> None:
        """Compiles into `folder`, which brokers under an account of their own must be able to read."""
        compiler = shutil.which("cc")
        if compiler is None:
            raise Unavailable("a false clock needs a C compiler, cc")
        self._jump, self._library = folder / "jump", folder / "clock.so"
        source = folder / "clock.c"
        source.write_text(SOURCE)
        jump = f'-DJUMP="{self._jump}"'
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", jump, "-o", self._library, source], check=True)
        self.environment = {"LD_PRELOAD": str(self._library)}

    def jump(self, seconds: int) -> None:
        """From now on it is off by so much."""
        fresh = self._jump.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._jump)  # nobody reads half a number

    def loaded_by(self, pid: int) -> bool:
        return str(self._library) in Path(f"/proc/{pid}/maps").read_text()


def server_off_s(server: ServerProcess) -> float:
    """How much a server's wall clock is ahead of this process's: its HTTP answers carry it."""
    with urlopen(f"http://{server.ready['http']}/live", timeout=10) as answer:
        return parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()


def check_off(off_s: float, wanted_s: float, whose: str) -> None:
    """Raises Unavailable when that clock did not jump: nothing would have been tried."""
    if abs(off_s - wanted_s) > TOLERANCE_S:
        raise Unavailable(f"the clock of {whose} is off by {off_s:.0f} s, not by {wanted_s:.0f} s")


def check_preloaded(clock: FalseClock, pid: int, whose: str) -> None:
    if not clock.loaded_by(pid):
        raise Unavailable(f"{whose} does not use the false clock")


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """For child processes started in this block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
