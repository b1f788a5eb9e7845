"""Reads the board now and then on a thread of its own, so that an inference only looks at the last result."""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from kinflow.board import tegrastats, throttled
from kinflow.board.state import read_state
from kinflow.board.strain import judge
from kinflow.board.tegra import Tegra
from kinflow.errors import InputError
from kinflow.logs import event
from kinflow.policy import Strain

log = logging.getLogger("kinflow.board")

COMMAND_TIMEOUT_S = 2.0


class BoardWatch:
    """Use it with `with`; called, it gives the Strain that `Device(…, strain=watch)` asks for."""

    def __init__(self, *, root: Path = Path("/"), interval_s: float = 1.0) -> None:
        self._root = root
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._tegra: Tegra | None = None
        self.state = read_state(root)
        self._strain = judge(self.state)

    def __enter__(self) -> BoardWatch:
        program = shutil.which("tegrastats") if self.state.kind == "jetson" else None
        if program is not None:
            self._tegra = Tegra(program, self._interval_s).__enter__()
        self._thread = threading.Thread(target=self._watch, name="kinflow-board", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._tegra is not None:
            self._tegra.__exit__(kind, error, trace)

    def __call__(self) -> Strain:
        return self._strain

    def _watch(self) -> None:
        vcgencmd = shutil.which("vcgencmd") if self.state.kind == "raspberrypi" else None
        while True:
            state = read_state(self._root)
            if state.throttled is None and vcgencmd is not None:
                state = replace(state, throttled=ask_firmware(vcgencmd))
            if self._tegra is not None and (said := self._tegra.said) is not None:
                state = tegrastats.completed(state, said)
            strain = judge(state)
            if (strain.share > 0) != (self._strain.share > 0):
                event(log, logging.INFO, "strain", share=strain.share, reason=strain.reason)
            self.state, self._strain = state, strain
            if self._stop.wait(self._interval_s):
                return


def ask_firmware(vcgencmd: str) -> throttled.Throttled | None:
    """`vcgencmd get_throttled`, for kernels without the sysfs file. None when it cannot be asked."""
    command = [vcgencmd, "get_throttled"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
        return throttled.parse(done.stdout)
    except (OSError, subprocess.SubprocessError, InputError) as exc:
        event(log, logging.DEBUG, "vcgencmd", error=exc)
        return None
