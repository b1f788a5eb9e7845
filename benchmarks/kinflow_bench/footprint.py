"""`bench footprint`: what a device install weighs, beside a bare onnxruntime script."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from kinflow.errors import BackendError

MEGABYTE = 1_000_000

# Each prints one JSON object. VmHWM: the most memory that was resident at any time.
_REPORT = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"import_s": import_s, "rss_mb": int(peak) * 1024 / 1e6}))
"""
KINFLOW = (
    """
import json, sys, time
start = time.perf_counter()
import kinflow
import_s = time.perf_counter() - start
import numpy as np
settings = kinflow.DeviceSettings(offload=False)
with kinflow.Device.open(sys.argv[1], settings) as device:
    spec = device.family.preprocess
    shape = (spec.height, spec.width) if spec.mode == "L" else (spec.height, spec.width, 3)
    device.infer(np.zeros(shape, np.uint8))
"""
    + _REPORT
)
BARE = (
    """
import json, sys, time
start = time.perf_counter()
import numpy as np
import onnxruntime
import_s = time.perf_counter() - start
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
node = session.get_inputs()[0]
session.run(None, {node.name: np.zeros([n if isinstance(n, int) else 1 for n in node.shape], np.float32)})
"""
    + _REPORT
)


def run(bundle: Path, rounds: int) -> dict[str, Any]:
    """Medians of fresh processes; disk from the installed packages' own file lists."""
    from kinflow.family import Family

    family = Family.load(bundle)
    graph = family.manifest.segments[family.manifest.members["device"].segments[0]].graphs["onnx"]
    sides = {"kinflow": (KINFLOW, str(bundle)), "bare": (BARE, str(family.path / graph.file.path))}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (script, argument) in sides.items():
            seen[name].append(_child(script, argument))
    disk = {
        "kinflow": _installed({"kinflow": ("onnx",)}),
        "bare": _installed({"onnxruntime": (), "numpy": ()}),
    }
    figures = {
        name: {
            "disk_mb": sum(disk[name].values()) / MEGABYTE,
            "import_s": statistics.median(figure["import_s"] for figure in seen[name]),
            "rss_mb": statistics.median(figure["rss_mb"] for figure in seen[name]),
        }
        for name in sides
    }
    return {
        "ratio": {key: figures["kinflow"][key] / figures["bare"][key] for key in figures["bare"]},
        **figures,
        "packages_mb": {name: round(size / MEGABYTE, 2) for name, size in sorted(disk["kinflow"].items())},
    }


def _child(script: str, argument: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"a measured script failed: {done.stderr.strip()[-300:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _installed(roots: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Bytes on disk of each package in the closure of `roots` (name -> extras), by their RECORD files."""
    sizes: dict[str, int] = {}
    waiting = list(roots.items())
    while waiting:
        name, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in sizes and not extras:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # its marker rules it out here
        if key == "kinflow":
            # An editable install has no file list: the SDK's sources are what a device gets.
            package = Path(__file__).resolve().parents[2] / "sdk" / "kinflow"
            sizes[key] = sum(path.stat().st_size for path in package.rglob("*.py"))
        else:
            files = distribution.files or []
            located = (Path(str(file.locate())) for file in files)
            sizes[key] = sum(path.stat().st_size for path in located if path.is_file())
        for requirement in distribution.requires or []:
            wanted = _needed(requirement, extras)
            if wanted is not None:
                waiting.append(wanted)
    return sizes


def _needed(requirement: str, extras: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """(name, extras) when the requirement holds here for one of `extras`."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    environments = [{"extra": extra} for extra in (*extras, "")]
    if parsed.marker is not None and not any(parsed.marker.evaluate(environment) for environment in environments):
        return None
    return parsed.name, tuple(parsed.extras)
