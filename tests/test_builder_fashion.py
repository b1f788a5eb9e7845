"""The committed fashion family: whole, small, as good as its card says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from kinflow import idx
from kinflow.family import Family
from kinflow_builder import measure
from kinflow_builder.curves import encode
from kinflow_builder.folders import Pictures

FASHION = Path(__file__).parents[1] / "families" / "fashion"
SAMPLES = 1000


@pytest.fixture(scope="module")
def family() -> Family:
    """The bundle, every file verified."""
    return Family.load(FASHION / "bundle")


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    """The committed test images and their labels."""
    images = idx.read(FASHION / "samples" / "images-idx3-ubyte.gz", 3)
    return images, idx.read(FASHION / "samples" / "labels-idx1-ubyte.gz", 1)


@pytest.fixture(scope="module")
def runs(family: Family, samples: tuple[np.ndarray, np.ndarray]) -> list[measure.TierRun]:
    """All samples through all tiers, coded at every hop."""
    pytest.importorskip("onnxruntime", reason="pip install 'kinflow[onnx]'")
    return measure.run_coded(family, Pictures(samples[0], None, family.labels).batches(family.preprocess))


def test_size_and_files(family: Family) -> None:
    """At most 4 MB, with a card, and nothing that the manifest and the card do not name."""
    folder = FASHION / "bundle"
    files = {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    pictures = set(re.findall(r"\]\((\w+\.png)\)", (folder / "card.md").read_text()))
    assert pictures
    assert files == {*family.files, "family.json", "card.md", *pictures}


def test_graphs_hold_no_folders(family: Family) -> None:
    """Nothing in the graphs tells of the machine that made them."""
    for name, raw in family.files.items():
        assert b"site-packages" not in raw, name


def test_samples(samples: tuple[np.ndarray, np.ndarray]) -> None:
    """A thousand images of every label, so that a demo shows all of them."""
    images, labels = samples
    assert images.shape == (SAMPLES, 28, 28)
    assert sorted(set(labels.tolist())) == list(range(10))


def test_accuracy_is_what_the_manifest_says(
    family: Family, samples: tuple[np.ndarray, np.ndarray], runs: list[measure.TierRun]
) -> None:
    """On the samples every exit is as good as on all test images, to within four standard errors."""
    for tier in runs:
        said = family.manifest.exits[tier.exit].accuracy
        found = measure.top1(tier.logits, samples[1].astype(np.int64))
        assert abs(found - said) <= 4 * math.sqrt(said * (1 - said) / SAMPLES), tier.exit


def test_accuracy_aims(family: Family) -> None:
    """What the family is there for: the largest member is the best one, and none is worse than it was."""
    accuracy = {name: exit.accuracy for name, exit in family.manifest.exits.items()}
    assert accuracy["device"] >= 0.93
    assert accuracy["edge"] >= 0.93
    assert max(accuracy.values()) == accuracy["cloud"] >= 0.936


def test_coding_costs_next_to_nothing(
    family: Family, samples: tuple[np.ndarray, np.ndarray], runs: list[measure.TierRun]
) -> None:
    """Coded features give nearly always the answer of the path on which nothing is quantised."""
    pictures = Pictures(samples[0], None, family.labels)
    labels = samples[1].astype(np.int64)
    for tier in runs[1:]:
        full = measure.run_full_precision(family, tier.member, pictures.batches(family.preprocess))
        # 0.3 points is the aim on 10,000 images; a thousand of them scatter by some tenths more.
        assert measure.top1(full, labels) - measure.top1(tier.logits, labels) <= 0.003 + 0.007, tier.member


def test_bytes_are_what_the_manifest_says(
    family: Family, samples: tuple[np.ndarray, np.ndarray], runs: list[measure.TierRun]
) -> None:
    """Coded features of unseen images take the bytes that the calibration images took, far fewer than a PNG."""
    codec = family.manifest.splits["s1"].codecs[family.manifest.splits["s1"].default_codec]
    assert codec.bytes_mean <= 120
    assert runs[1].bytes_up.mean() == pytest.approx(codec.bytes_mean, rel=0.05)
    png = [len(encode(image, "PNG", optimize=True)) for image in samples[0][:200]]
    assert runs[1].bytes_up.mean() < 0.25 * np.mean(png)


def test_card_repeats_the_manifest(family: Family) -> None:
    """The card's accuracies and thresholds are the manifest's."""
    card = (FASHION / "bundle" / "card.md").read_text()
    for name, exit in family.manifest.exits.items():
        assert re.search(rf"\| {name} \| {100 * exit.accuracy:.2f}% ", card), name
        assert f"| {name} | {exit.temperature:.3f} | {exit.threshold:.3f} |" in card


def test_log_belongs_to_the_bundle(family: Family) -> None:
    """The committed log ends with this bundle's figures and holds no folder of the machine that made it."""
    log = (FASHION / "train.log").read_text()
    for name, exit in family.manifest.exits.items():
        assert f"test top-1 {name}: {100 * exit.accuracy:.2f} coded" in log
    assert re.search(r"(^|\s)/\w+", log) is None
