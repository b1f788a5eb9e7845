"""Every `kinflow bench` command runs and prints what it documents; nothing here asserts a clock."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from brokers import KINDS
from kinflow import idx
from kinflow.confidence import probabilities
from kinflow.family import Family
from kinflow.preprocess import Preprocessor
from kinflow_bench.certificate import tallied
from kinflow_builder.bdrate import Point, bd_rate
from system_fixtures import FASHION, running, sample_images

SPREAD = {"median", "min", "max", "runs"}


def bench(*arguments: str, timeout_s: float = 280) -> dict[str, Any]:
    with running("bench", *arguments, "--json") as run:
        assert run.wait(timeout_s) == 0, run.err[-5:]
        assert run.gone()
        (line,) = run.out
    figures: dict[str, Any] = json.loads(line)
    assert {"processor", "cores", "python", "kinflow", "numpy", "onnxruntime"} <= set(figures["machine"])
    return figures


def test_local() -> None:
    """Ratios for the family's device member and for a graph of about 10 ms, with both sides beside them."""
    figures = bench("local", str(FASHION), "--rounds", "1")
    assert figures["ratio"] == figures["device_member"]["ratio"] > 0
    assert figures["ratio_10ms"] == figures["graph_10ms"]["ratio"] > 0
    for side in ("device_member", "graph_10ms"):
        for name in ("infer_ms", "bare_ms"):
            assert set(figures[side][name]) == SPREAD
            assert figures[side][name]["runs"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_offload(kind: str) -> None:
    """The ratio by size in kB, through the broker that was asked for; payloads are as large as they are called."""
    figures = bench("offload", "--rounds", "2", "--broker-kind", kind)
    assert set(figures["ratio"]) == {"1", "16", "64"}
    assert all(ratio > 0 for ratio in figures["ratio"].values())
    for size, seen in figures["sizes"].items():
        assert seen["broker"] == kind
        assert 0.95 < seen["bytes_up"] / (1024 * int(size)) < 1.3
        assert set(seen["offload_ms"]) == set(seen["echo_ms"]) == SPREAD
        assert seen["offload_ms"]["runs"] == 2


def test_throughput() -> None:
    """Offloads and bare runs per second, with the settings they hold for."""
    figures = bench("throughput", str(FASHION), "--rounds", "1", "--batch-size", "8")
    assert figures["ratio"] == pytest.approx(figures["offloads_per_s"]["median"] / figures["bare_per_s"]["median"])
    assert figures["offloads_per_s"]["median"] > 0
    assert figures["batch_size"] == 8
    assert str(figures["bare_best_batch"]) in figures["bare_per_s_by_batch"]


def test_footprint() -> None:
    """Disk, import time and memory of both sides, and the packages that make up the disk."""
    figures = bench("footprint", str(FASHION), "--rounds", "1")
    for side in ("kinflow", "bare"):
        assert set(figures[side]) == {"disk_mb", "import_s", "rss_mb"}
        assert all(value > 0 for value in figures[side].values())
    assert set(figures["ratio"]) == {"disk_mb", "import_s", "rss_mb"}
    assert {"kinflow", "numpy", "onnxruntime", "paho-mqtt", "zeroconf", "msgspec"} <= set(figures["packages_mb"])
    assert not {"torch", "typer", "pillow"} & set(figures["packages_mb"])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The committed family's folder with a recipe whose test images are the committed samples."""
    shutil.copytree(FASHION / "bundle", tmp_path / "bundle")
    recipe = (FASHION / "recipe.toml").read_text()
    for kind, name in (("images", "images-idx3-ubyte.gz"), ("labels", "labels-idx1-ubyte.gz")):
        content = gzip.decompress((FASHION / "samples" / name).read_bytes())
        table = f'[data.test_{kind}]\nname = "{name}"\nsha256 = "{hashlib.sha256(content).hexdigest()}"\n'
        recipe, found = re.subn(rf"\[data\.test_{kind}\]\n(?:\w.*\n)+", table, recipe)
        assert found == 1
    (tmp_path / "recipe.toml").write_text(recipe)
    return tmp_path


def test_accuracy(small: Path) -> None:
    """Top-1 in percent of every member, coded and in full precision; the device's is what its graph gives here."""
    figures = bench("accuracy", str(small), "--data", str(FASHION / "samples"))
    assert figures["images"] == 1000
    for name in ("device", "edge", "cloud", "edge_full_precision", "cloud_full_precision"):
        assert 50 < figures[name] <= 100
    family = Family.load(small / "bundle")
    prepare = Preprocessor(family.preprocess)
    logits = family.member("device").run(np.concatenate([prepare(image) for image in sample_images()])).logits
    labels = idx.read(FASHION / "samples/labels-idx1-ubyte.gz", axes=1)
    assert figures["device"] == pytest.approx(100 * (logits.argmax(axis=1) == labels).mean())
    exit = family.manifest.exits["device"]
    kept = probabilities(logits, exit.temperature).max(axis=1) >= exit.threshold
    assert figures["local_share"] == pytest.approx(100 * kept.mean())
    assert sum(figures["shares"].values()) == pytest.approx(100)
    assert abs(figures["overall"] - figures["cloud"]) < 2
    codec = family.manifest.splits["s1"].codecs[family.manifest.splits["s1"].default_codec]
    assert figures["feature_bytes_mean"] == pytest.approx(codec.bytes_mean, rel=0.1)
    losses = [figures[f"{name}_full_precision"] - figures[name] for name in ("edge", "cloud")]
    assert figures["tail_loss_points"] == pytest.approx(max(losses))
    default = figures["codecs"].pop(family.manifest.splits["s1"].default_codec)
    for name in ("edge", "cloud", "feature_bytes_mean", "tail_loss_points"):
        assert default[name] == pytest.approx(figures[name])
    sizes = [other["feature_bytes_mean"] for name, other in figures["codecs"].items() if "q4x" in name]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < default["feature_bytes_mean"]


def test_accuracy_of_a_bundle_on_pictures(tmp_path: Path) -> None:
    """A bundle needs no recipe where --data has class folders; without both the error names the way out."""
    labels = idx.read(FASHION / "samples/labels-idx1-ubyte.gz", axes=1)
    for number, image in enumerate(sample_images(40)):
        folder = tmp_path / "photos" / str(labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    figures = bench("accuracy", str(FASHION / "bundle"), "--data", str(tmp_path / "photos"))
    assert figures["images"] == 40
    assert figures["device"] > 50
    with running("bench", "accuracy", str(FASHION / "bundle")) as run:
        assert run.wait(60) == 2
        assert "--data" in run.err[-1]


def test_codec() -> None:
    """BD-rates between the accuracies that are named, and the curves from which they can be had again."""
    figures = bench("codec", str(FASHION), "--data", str(FASHION / "samples"), "--images", "60")
    assert figures["images"] == 60
    curve = figures["curve"]
    points = {name: [Point(point["bytes_mean"], point["top1"] / 100) for point in curve[name]] for name in curve}
    codecs = Family.load(FASHION / "bundle").manifest.splits["s1"].codecs
    assert [point["codec"] for point in curve["features"]] == list(codecs)
    for point in curve["features"]:
        assert point["bytes_mean"] == pytest.approx(codecs[point["codec"]].bytes_mean, rel=0.15)
    for kind in ("jpeg", "webp"):
        found = bd_rate(points["features"], points[kind])
        assert figures[f"bd_rate_{kind}"] == (None if found.percent is None else pytest.approx(found.percent))
        assert figures["compared_between"][kind] == pytest.approx([100 * found.low, 100 * found.high])
        assert {(point["height"], point["width"]) for point in curve[kind]} == {(28, 28), (21, 21), (14, 14)}
    # A JPEG of quality 100 is as good as the pixels, and larger than they are.
    (best,) = [point for point in curve["jpeg"] if point["quality"] == 100]
    assert best["bytes_mean"] > 784


def test_certificate() -> None:
    """Few thresholds break their promise; each exit but the last one is tried."""
    data = str(FASHION / "samples")
    figures = bench("certificate", str(FASHION), "--data", data, "--splits", "200", "--epsilon", "0.02")
    assert (figures["epsilon"], figures["splits"], figures["calibration_images"]) == (0.02, 200, 500)
    assert set(figures["exits"]) == {"device", "edge"}
    assert figures["violations_share"] == figures["violations"] / 200 <= figures["allowed_share"]
    assert figures["exits"]["device"]["violations"] == figures["violations"]
    assert 50 < figures["local_share"] <= 100


def test_certificate_notices_a_broken_promise() -> None:
    """Where the true risk is known, delta is used up, and a certificate made with ten times the delta fails."""
    random = np.random.default_rng(0)
    confidence = random.uniform(0, 1, 4000)
    losses = random.uniform(0, 1, 4000) < 0.2 * (1 - confidence)
    honest = tallied(confidence, losses, 0.02, 0.05, 300)
    allowed = 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
    assert 0 < honest.violations / 300 <= allowed
    assert honest.kept_share > 0.05
    broken = tallied(confidence, losses, 0.02, 0.5, 300)
    assert broken.violations / 300 > allowed


def test_certificate_needs_enough_images() -> None:
    """The bundle's own epsilon is far too small for half of the samples: said so."""
    with running("bench", "certificate", str(FASHION), "--data", str(FASHION / "samples"), "--epsilon", "0.001") as run:
        assert run.wait(60) == 2
        assert "half of 1000 images calibrates, epsilon 0.001 with delta 0.05 needs 2995" in run.err[-1]


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    """Named, status 2."""
    with running("bench", "local", str(tmp_path), "--json") as run:
        assert run.wait(60) == 2
        assert len(run.err) == 1
        assert str(tmp_path) in run.err[0]
