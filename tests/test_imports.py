"""What may import what: the SDK nothing of the servers, a bare install nothing of the extras."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kinflow
from conftest import ROOT

PACKAGES = {
    "kinflow": "sdk",
    "kinflow_edge": "edge_server",
    "kinflow_cloud": "cloud_server",
    "kinflow_builder": "builder",
    "kinflow_bench": "benchmarks",
}
# Who may import whom, besides itself.
ALLOWED = {
    "kinflow": set(),
    "kinflow_edge": {"kinflow"},
    "kinflow_cloud": {"kinflow", "kinflow_edge"},
    "kinflow_builder": {"kinflow"},
    "kinflow_bench": set(PACKAGES),
}
HEAVY = {"torch", "onnxruntime", "onnx", "ai_edge_litert", "tflite_runtime", "typer", "rich", "PIL", "iotcore"}

# As in an environment without the extras: only the standard library and the base dependencies are found.
BASE_INSTALL = """
import importlib.util, sys
BASE = {"numpy", "paho", "zeroconf", "ifaddr", "msgspec", "tomli", "async_timeout"}
ALLOWED = sys.stdlib_module_names | BASE | {"kinflow"}
class Bare:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)
sys.meta_path[:] = [Bare(sys.meta_path[:])]
assert importlib.util.find_spec("onnxruntime") is None
"""


def child(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(package: str) -> Iterator[tuple[str, str]]:
    """(file and line, top-level module) of every import, those within functions included."""
    for file in sorted((ROOT / PACKAGES[package] / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: a relative import"
                modules = [str(node.module)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_module", "__import__"):
                modules = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
            for module in modules:
                yield f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    """Servers, builder and benchmarks import the SDK, never the other way, and no server imports the builder."""
    ours = [(place, module) for place, module in imported_by(package) if module in PACKAGES]
    wrong = [found for found in ours if found[1] not in ALLOWED[package] | {package}]
    assert not wrong


def test_importing_kinflow_loads_no_extra() -> None:
    """Neither a runtime, nor torch, nor the command line, nor a server: a device starts quickly."""
    loaded = set(json.loads(child("import json, sys, kinflow; print(json.dumps(list(sys.modules)))")))
    top = {name.partition(".")[0] for name in loaded}
    assert "kinflow" in top
    assert not top & HEAVY
    assert not top & (set(PACKAGES) - {"kinflow"})
    assert "kinflow.testing" not in loaded


def test_a_base_install_imports_and_browses() -> None:
    """With the base dependencies alone, every public name is there and a browser runs on loopback."""
    said = child(
        BASE_INSTALL
        + """
import kinflow, kinflow.testing, kinflow.idx, kinflow.link
assert all(hasattr(kinflow, name) for name in kinflow.__all__)
from kinflow.discovery import Browser
with Browser(interfaces=["127.0.0.1"]) as browser:
    browser.check()
    print(isinstance(browser.nodes(), tuple))
"""
    )
    assert said == "True\n"


def test_a_base_install_reads_a_bundle_and_says_which_runtime_is_missing(bundle: Path) -> None:
    """The bundle is verified without a runtime; opening a device names the extra to install."""
    said = child(
        BASE_INSTALL
        + """
import kinflow
family = kinflow.Family.load(sys.argv[1])
for backend in ("onnx", "tflite"):
    try:
        kinflow.Device(family, kinflow.DeviceSettings(backend=backend))
    except kinflow.KinflowError as exc:
        print(type(exc).__name__, exc)
""",
        str(bundle),
    )
    assert said.splitlines() == [
        "BackendError ONNX Runtime is not installed: pip install 'kinflow[onnx]'",
        "FamilyMismatch segment 'trunk0' of synthetic has graphs for 'onnx', asked for 'tflite'",
    ]


def test_public_names_are_sorted_and_there() -> None:
    """`__all__` is the surface, and each name in it exists."""
    assert kinflow.__all__ == sorted(kinflow.__all__)
    assert len(set(kinflow.__all__)) == len(kinflow.__all__)
    for name in kinflow.__all__:
        assert getattr(kinflow, name) is not None


def test_every_error_of_the_tree_descends_from_one() -> None:
    """`except kinflow.KinflowError` catches all of them, each with a wire code of its own."""
    errors = importlib.import_module("kinflow.errors")
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(kind, kinflow.KinflowError) for kind in kinds)
    assert len({vars(kind)["code"] for kind in kinds}) == len(kinds)
    drawn = str(errors.__doc__)
    assert all(kind.__name__ in drawn for kind in kinds)
