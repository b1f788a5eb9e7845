"""Shared by all tests: a small real bundle made on the spot, the committed one, and hypothesis without a clock."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import msgspec
import pytest

from kinflow.family import Family

ROOT = Path(__file__).resolve().parents[1]

# The machine may be busy with something else: a slow example is no failure. The same examples every time in
# `make test`; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("kinflow", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=5000)
# An emulated processor (devices/tests) is some fifty times slower.
hypothesis.settings.register_profile("board", deadline=None, derandomize=True, database=None, max_examples=5)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kinflow"))

CLONE_NEWNET = 0x40000000
IP = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")


@pytest.hookimpl(optionalhook=True)  # an emulated board has pytest alone
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each core where each can have a network of its own, else none.

    On a network that they share, the devices of one test find the servers of another.
    """
    can_unshare = os.geteuid() == 0 and IP is not None
    if can_unshare:
        can_unshare = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
    return len(os.sched_getaffinity(0)) if can_unshare else 0


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        assert IP is not None
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "no network namespace for this worker")
        subprocess.run([IP, "link", "set", "lo", "up"], check=True)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real bundle of two kilobytes: 8×8 images, features [2, 8, 8] after the first segment.

    Do not change it: it is made once for all tests.
    """
    pytest.importorskip("onnx", reason="the bundle is made of ONNX operators: pip install onnx")
    from kinflow_bench import synthetic

    folder = tmp_path_factory.mktemp("synthetic") / "bundle"
    synthetic.write(folder, synthetic.Shape(side=8, channels=2))
    return folder


@pytest.fixture(scope="session")
def family(bundle: Path) -> Family:
    """`bundle`, loaded."""
    return Family.load(bundle)


@pytest.fixture(scope="session")
def fashion() -> Path:
    """The folder of the committed bundle."""
    return ROOT / "families/fashion/bundle"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random language model's bundle: six layers, a token per byte. Do not change it."""
    pytest.importorskip("onnx", reason="the bundle is made of ONNX operators: pip install onnx")
    pytest.importorskip("tokenizers", reason="pip install 'kinflow[text]'")
    from kinflow_builder.text.tiny import write_tiny

    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def brief_timing() -> Iterator[None]:
    """The builder's stop watch takes five calls instead of half a second: a card needs some twenty medians."""
    from kinflow_builder import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "WARM_S", 0.0)
        patch.setattr(measure, "TIMED_S", 0.0)
        yield


@pytest.fixture(scope="session")
def always_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed family; its device is never sure, its edge always."""
    from system_fixtures import copy_bundle

    return copy_bundle(tmp_path_factory.mktemp("edge") / "bundle", thresholds={"device": 1.0, "edge": 0.0})


@pytest.fixture(scope="session")
def always_cloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed family; neither its device nor its edge are ever sure."""
    from system_fixtures import copy_bundle

    return copy_bundle(tmp_path_factory.mktemp("cloud") / "bundle", thresholds={"device": 1.0, "edge": 1.0})


@pytest.fixture
def own_family(family: Family) -> Family:
    """Under an id that nobody else on this machine announces."""
    return replace(family, manifest=msgspec.structs.replace(family.manifest, id=f"test-{os.urandom(6).hex()}"))
