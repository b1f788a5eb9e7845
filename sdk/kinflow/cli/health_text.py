"""A short text here and with a server's help, each in a process of its own, as a user would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kinflow.cli.health import Check
from kinflow.settings import DeviceSettings

RUN_TIMEOUT_S = 120.0
TOKENS = 8


def local(bundle: Path) -> list[Check]:
    """A few tokens of the device's own."""
    made = _run(bundle, "--mode", "local")
    if isinstance(made, Check):
        return [made]
    seconds = made["summary"]["seconds"]
    count = len(made["tokens"])
    return [Check("inference", "ok", f"{bundle} writes {count} tokens in {seconds:.1f} s")]


def offloaded(bundle: Path, settings: DeviceSettings, flags: list[str]) -> list[Check]:
    """The same, verified by a server."""
    made = _run(bundle, "--mode", "family", *flags)
    if isinstance(made, Check):
        return [made]
    summary = made["summary"]
    if summary["verifications"] and not summary["degraded"]:
        per_token = summary["bytes_up"] / max(len(made["tokens"]), 1)
        found = f"{', '.join(summary['servers'])} verified {len(made['tokens'])} tokens, {per_token:.0f} bytes up each"
        return [Check("offload", "ok", found)]
    advice = "start a server (kinflow edge BUNDLE), or look at `kinflow discover`; until then the device writes alone"
    found = f"the device wrote by itself: {summary['reason']}"
    # Without a named broker nobody promised that there is a server.
    return [Check("offload", "fail" if settings.broker else "warn", found, advice)]


def _run(bundle: Path, *flags: str) -> dict[str, Any] | Check:
    command = [sys.executable, "-m", "kinflow", "generate", "Hello.", "--json"]
    command += ["--bundle", str(bundle), "--max-tokens", str(TOKENS), *flags]
    try:
        done = subprocess.run(command, capture_output=True, timeout=RUN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("inference", "fail", f"no text within {RUN_TIMEOUT_S:.0f} s", "is the machine overloaded?")
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        return Check("inference", "fail", lines[-1].removeprefix("error: "), "see the line itself")
    made: dict[str, Any] = json.loads(done.stdout)
    return made
