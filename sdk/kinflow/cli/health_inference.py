"""One real inference end to end, each in a process of its own, as a user would run it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from kinflow.bundle import task_of
from kinflow.cli import health_text
from kinflow.cli.bundles import choose_bundle
from kinflow.cli.health import Check
from kinflow.cli.health_machine import judge_probe
from kinflow.device import load_family
from kinflow.errors import KinflowError, SettingsError
from kinflow.family import Family
from kinflow.settings import DeviceSettings
from kinflow.text.manifest import TASK

RUN_TIMEOUT_S = 120.0
SERVER_WAIT_S = 3.0


def local(bundle: Path | None, settings: DeviceSettings) -> list[Check]:
    """A grey frame through the device member."""
    try:
        path = choose_bundle(bundle, None)
    except SettingsError as exc:
        return [Check("inference", "warn", str(exc), "without one, nothing was run")]
    try:
        if task_of(path) == TASK:
            return health_text.local(path)
        family = load_family(path, settings)
    except KinflowError as exc:
        return [Check("inference", "fail", str(exc), "fetch the bundle again")]
    answer = _run(path, family, settings.backend, "--local")
    if isinstance(answer, Check):
        return [answer]
    found = f"{family.id} {family.version} on {settings.backend}: an answer in {answer['total_ms']:.1f} ms"
    return [Check("inference", "ok", found)]


def offloaded(bundle: Path | None, settings: DeviceSettings) -> list[Check]:
    """The same frame with a threshold that only a server's answer can satisfy."""
    flags = ["--wait", str(SERVER_WAIT_S)]
    flags += ["--broker", settings.broker] if settings.broker else []
    flags += ["--tls", settings.tls.folder] if settings.tls.folder else []
    flags += ["--insecure-lan"] if settings.tls.insecure_lan else []
    for address in settings.interfaces:
        flags += ["--interface", address]
    try:
        path = choose_bundle(bundle, None)
        if task_of(path) == TASK:
            return health_text.offloaded(path, settings, flags)
        family = load_family(path, settings)
    except KinflowError:
        return []  # `local` has said it
    answer = _run(path, family, settings.backend, "--threshold", "1", "--deadline", "5", *flags)
    if isinstance(answer, Check):
        return [answer]
    if answer["tier"] != "device":
        took = f"in {answer['total_ms']:.1f} ms, {answer['bytes_up']} bytes up"
        return [Check("offload", "ok", f"the {answer['tier']} tier answered {took}")]
    advice = "start a server (kinflow edge BUNDLE), or look at `kinflow discover`; until then answers stay here"
    found = f"the device kept its answer: {answer['reason']}"
    # Without a named broker nobody promised that there is a server.
    return [Check("offload", "fail" if settings.broker else "warn", found, advice)]


def _run(path: Path, family: Family, backend: str, *flags: str) -> dict[str, Any] | Check:
    """One grey frame through `kinflow run`, in a process of its own: it may die of SIGILL, this one not."""
    size = family.preprocess
    frame = b"\x80" * math.prod((size.height, size.width, len(size.mean)))
    command = [sys.executable, "-m", "kinflow", "run", "-", "--json"]
    command += ["--bundle", str(path), "--backend", backend, *flags]
    try:
        done = subprocess.run(command, input=frame, capture_output=True, timeout=RUN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("inference", "fail", f"no answer within {RUN_TIMEOUT_S:.0f} s", "is the machine overloaded?")
    errors = done.stderr.decode(errors="replace")
    if done.returncode < 0:
        package = "onnxruntime" if backend == "onnx" else "ai-edge-litert"
        verdict = judge_probe(f"{package} in use", package, done.returncode, errors, 0.0)
        return Check("inference", "fail", verdict.found, f"install another version of {package}")
    if done.returncode > 0:
        last = (errors.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        return Check("inference", "fail", last, "see the line itself")
    record: dict[str, Any] = json.loads(done.stdout)
    return record
