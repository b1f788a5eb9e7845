"""The committed family of stitched photo classifiers: whole, small enough, and right about photos."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kinflow.family import Family
from kinflow.images import sources
from kinflow.manifest import BackendName
from kinflow.preprocess import Preprocessor

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "families/imagenet_lite"
PHOTOS = ROOT / "examples/photos"
# What the photos show, in ImageNet's words; where it has several, any of them.
SHOWN = {"camera": {"tripod"}, "cat": {"tabby", "tiger cat", "Egyptian cat"}, "coffee": {"espresso", "cup"}}

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="pip install 'kinflow[onnx]'")


@pytest.fixture(scope="module")
def family() -> Family:
    """The bundle, every file verified."""
    return Family.load(FOLDER / "bundle")


@pytest.fixture(scope="module")
def photos(family: Family) -> dict[str, np.ndarray]:
    """By name, preprocessed."""
    prepare = Preprocessor(family.preprocess)
    items = sources([PHOTOS], family.preprocess)
    return {Path(item.name).stem: prepare(item.image) for item in items}


def test_size_and_files(family: Family) -> None:
    """The device's graph takes at most 7 MB, the whole bundle 30 MB, and nothing lies in it that nothing names."""
    folder = FOLDER / "bundle"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes["device.onnx"] <= 7_000_000
    assert sum(sizes.values()) <= 30_000_000
    pictures = set(re.findall(r"\]\((\w+\.png)\)", (folder / "card.md").read_text()))
    assert set(sizes) == {*family.files, "family.json", "card.md", *pictures}


def test_graphs_hold_no_folders(family: Family) -> None:
    """Nothing in the graphs tells of the machine that made them."""
    for name, raw in family.files.items():
        assert b"site-packages" not in raw, name


@pytest.mark.parametrize("member", ["device", "edge", "cloud"])
def test_members_name_what_photos_show(family: Family, photos: dict[str, np.ndarray], member: str) -> None:
    """Each member, the larger ones from coded features of at most 3,000 bytes."""
    device, upper = family.member("device"), family.member(member, source="s1" if member != "device" else "input")
    codec = family.codec("s1", "")
    for name, shown in SHOWN.items():
        output = device.run(photos[name])
        if member != "device":
            assert output.features is not None
            coded = codec.encode(output.features[0])
            assert len(coded) <= 3000
            output = upper.run(codec.decode(coded)[None])
        assert family.labels[int(output.logits[0].argmax())] in shown, name


@pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="pip install 'kinflow[tflite]'")
def test_tflite_agrees(family: Family, photos: dict[str, np.ndarray]) -> None:
    """Both 8-bit graphs of the device give nearly the same features and, where they are sure, the same answer."""
    backends: tuple[BackendName, ...] = ("onnx", "tflite")
    for name, image in photos.items():
        one, other = (family.member("device", backend=backend).run(image) for backend in backends)
        assert one.features is not None
        assert other.features is not None
        assert np.corrcoef(one.features.ravel(), other.features.ravel())[0, 1] > 0.95
        assert np.corrcoef(one.logits.ravel(), other.logits.ravel())[0, 1] > 0.95
        if name in SHOWN:
            assert family.labels[int(other.logits[0].argmax())] in SHOWN[name]


def test_run_names_a_photo() -> None:
    """`kinflow run --family imagenet_lite photo.jpg`, as a user types it."""
    command = [sys.executable, "-m", "kinflow", "run", str(PHOTOS / "coffee.jpg"), "--family", "imagenet_lite"]
    done = subprocess.run(
        [*command, "--local", "--json"], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout)["label"] in SHOWN["coffee"]


def test_photos_have_terms() -> None:
    """Each photo stands in the table that says whose it is and under which terms it may be given away."""
    told = (PHOTOS / "README.md").read_text()
    files = sorted(path.name for path in PHOTOS.glob("*.jpg"))
    assert len(files) == 6
    assert re.findall(r"^\| (\S+\.jpg) \|.*\| (?:CC0|public domain) \|$", told, re.MULTILINE) == files
