"""The committed nested family: whole, small, its prefixes aligned, token merging among its codecs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kinflow import idx
from kinflow.family import Family
from kinflow.preprocess import Preprocessor
from kinflow.tokens import TokenMergeCodec
from kinflow_builder import measure

DIGITS = Path(__file__).parents[1] / "families" / "digits_nested"


@pytest.fixture(scope="module")
def family() -> Family:
    """The bundle, every file verified."""
    return Family.load(DIGITS / "bundle")


@pytest.fixture(scope="module")
def inputs(family: Family) -> np.ndarray:
    """All test images, preprocessed."""
    prepare = Preprocessor(family.preprocess)
    return np.concatenate([prepare(image) for image in idx.read(DIGITS / "data" / "test-images-idx3-ubyte.gz", 3)])


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Of these images."""
    return idx.read(DIGITS / "data" / "test-labels-idx1-ubyte.gz", 1)


def test_data_are_the_whole_set() -> None:
    """1,797 images of ten digits, none of them twice in training and test."""
    files = {part: DIGITS / "data" / f"{part}-images-idx3-ubyte.gz" for part in ("train", "test")}
    parts = {part: idx.read(file, 3).reshape(-1, 64) for part, file in files.items()}
    assert (len(parts["train"]), len(parts["test"])) == (1400, 397)
    seen = {image.tobytes() for image in parts["train"]}
    assert not any(image.tobytes() in seen for image in parts["test"])


def test_members_shrink(family: Family) -> None:
    """The device has about a quarter of the cloud member's parameters, and the bundle stays below a megabyte."""
    segments = family.manifest.segments
    assert segments["device"].parameters < 0.4 * (segments["cloud"].parameters + segments["device"].parameters)
    assert segments["edge"].parameters < segments["cloud"].parameters
    assert sum(path.stat().st_size for path in (DIGITS / "bundle").iterdir()) < 1_000_000


def test_every_member_reads_the_devices_features(family: Family, inputs: np.ndarray, labels: np.ndarray) -> None:
    """Top-1 on all test images is what the manifest says of each exit, at fewer bytes than the raw image has."""
    pytest.importorskip("onnxruntime", reason="pip install 'kinflow[onnx]'")
    for run in measure.run_coded(family, measure.in_batches(inputs)):
        assert measure.top1(run.logits, labels) == pytest.approx(family.manifest.exits[run.exit].accuracy, abs=0.011)
        assert measure.top1(run.logits, labels) > 0.93
        assert run.bytes_up.mean() < 64


def test_merged_tokens_are_cheaper(family: Family, inputs: np.ndarray, labels: np.ndarray) -> None:
    """The token-merge codecs send fewer bytes than the default one, fewer with fewer clusters, and are still read."""
    pytest.importorskip("onnxruntime", reason="pip install 'kinflow[onnx]'")
    merging = [codec for codec in family.codecs.values() if isinstance(codec, TokenMergeCodec)]
    merging.sort(key=lambda codec: -codec.clusters)
    assert merging
    sizes = [float(measure.run_coded(family, measure.in_batches(inputs))[-1].bytes_up.mean())]
    for codec in merging:
        run = measure.run_coded(family, measure.in_batches(inputs), {"s1": codec.name})[-1]
        sizes.append(float(run.bytes_up.mean()))
        assert measure.top1(run.logits, labels) > 0.5
    assert sizes == sorted(sizes, reverse=True)
