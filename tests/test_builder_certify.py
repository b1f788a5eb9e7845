"""`kinflow certify` on the committed bundle and its samples: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install 'kinflow[certify]'")
from PIL import Image
from typer.testing import CliRunner

from kinflow import idx
from kinflow.cli.app import app
from kinflow.confidence import probabilities
from kinflow.errors import InputError, SettingsError
from kinflow.family import Family
from kinflow_builder import measure
from kinflow_builder.calibrate import THRESHOLDS, fewest, p_value
from kinflow_builder.certify import certify_bundle
from kinflow_builder.exits import divided
from kinflow_builder.recipe import Exit as Promise

FASHION = Path(__file__).parents[1] / "families" / "fashion"
PROMISE = Promise(0.02, 0.05)
IMAGES = 500


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An idx pair of half of the samples, which is quicker."""
    folder = tmp_path_factory.mktemp("samples")
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        idx.write(folder / name, idx.read(FASHION / "samples" / name)[:IMAGES])
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the committed bundle."""
    return Path(shutil.copytree(FASHION / "bundle", tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_labelled(bundle: Path, samples: Path) -> None:
    """The threshold is the last that passes on the images the temperature has not seen; all else stays as it is."""
    before = contents(bundle)
    report = certify_bundle(bundle, samples, PROMISE)
    family = Family.load(bundle)
    changed = {name for name, raw in contents(bundle).items() if before[name] != raw}
    assert changed == {"family.json", "card.md"}
    labels = idx.read(samples / "labels-idx1-ubyte.gz", 1).astype(np.int64)
    images = idx.read(samples / "images-idx3-ubyte.gz", 3)
    mean, std = family.preprocess.mean[0], family.preprocess.std[0]
    batch = ((images[:, None] / 255 - mean) / std).astype(np.float32)
    runs = measure.run_coded(family, measure.in_batches(batch))
    _, chosen = divided(IMAGES, labelled=True)
    for run in runs[:-1]:
        exit = family.manifest.exits[run.exit]
        given = exit.certificate
        assert given is not None
        assert (given.n, given.risk, given.epsilon, given.delta) == (400, "gap", 0.02, 0.05)
        assert given.data_sha256 == report.data_sha256
        assert exit.threshold == given.threshold
        wrong = (run.logits.argmax(1) != labels) & (runs[-1].logits.argmax(1) == labels)
        confidence = probabilities(run.logits, exit.temperature).max(axis=1)[chosen]

        def p(threshold: float, confidence=confidence, wrong=wrong[chosen]) -> float:  # type: ignore[no-untyped-def]
            return p_value(int((wrong & (confidence >= threshold)).sum()), 400, 0.02)

        assert p(exit.threshold) <= 0.05
        assert exit.threshold == 0 or p(THRESHOLDS[THRESHOLDS.index(exit.threshold) + 1]) > 0.05
        assert given.kept_share == pytest.approx((confidence >= exit.threshold).mean())
    assert family.manifest.exits["cloud"].certificate is None


def test_unlabelled(bundle: Path, samples: Path) -> None:
    """Temperatures stay, the risk is that of another answer than the largest member's, all images certify."""
    before = Family.load(bundle).manifest.exits
    report = certify_bundle(bundle, samples, Promise(0.03, 0.1), labelled=False)
    after = Family.load(bundle).manifest.exits
    for name in ("device", "edge"):
        given = after[name].certificate
        assert given is not None
        assert (given.n, given.risk) == (IMAGES, "consistency")
        assert after[name].temperature == before[name].temperature
        assert report.after[name].risk <= 0.03
    assert after["cloud"] == before["cloud"]


def test_one_exit(bundle: Path, samples: Path) -> None:
    """The other exit keeps its certificate, and the temperature that this was made with."""
    before = Family.load(bundle).manifest.exits
    certify_bundle(bundle, samples, PROMISE, only="device")
    after = Family.load(bundle).manifest.exits
    assert after["edge"] == before["edge"]
    assert after["device"] != before["device"]


def test_card_tells_of_the_last_one(bundle: Path, samples: Path) -> None:
    """The card gets a section with the thresholds in use; a second call replaces it."""
    first = (bundle / "card.md").read_text()
    certify_bundle(bundle, samples, PROMISE)
    once = (bundle / "card.md").read_text()
    assert once.startswith(first.rstrip())
    certify_bundle(bundle, samples, Promise(0.03, 0.05), labelled=False)
    twice = (bundle / "card.md").read_text()
    assert twice.count("## Certified again") == once.count("## Certified again") == 1
    assert "gap <= 2.00%" in once
    assert "consistency <= 3.00%" in twice


def test_class_folders_need_no_order(bundle: Path, samples: Path, tmp_path: Path) -> None:
    """The same pictures sorted into class folders certify as well: temperatures do not see one class alone."""
    labels = idx.read(samples / "labels-idx1-ubyte.gz", 1)
    for number, image in enumerate(idx.read(samples / "images-idx3-ubyte.gz", 3)):
        folder = tmp_path / "photos" / str(labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    report = certify_bundle(bundle, tmp_path / "photos", PROMISE, out=tmp_path / "new")
    assert report.after["device"].kept_share > 0.8
    assert 0.4 < report.after["device"].temperature < 1.5
    assert Family.load(tmp_path / "new").manifest.exits["device"].threshold == report.after["device"].threshold


def test_fewest_is_the_tables_number() -> None:
    """1% and 2% at 5% need 299 and 149 images without a loss, and one fewer does not do."""
    assert (fewest(0.01, 0.05), fewest(0.02, 0.05)) == (299, 149)
    assert fewest(0.5, 0.9) == 1
    for epsilon, delta in ((0.003, 0.05), (0.2, 0.01)):
        assert p_value(0, fewest(epsilon, delta), epsilon) <= delta < p_value(0, fewest(epsilon, delta) - 1, epsilon)


def test_too_few(bundle: Path, samples: Path) -> None:
    """The error says how many pictures are needed, and the bundle is as it was."""
    before = contents(bundle)
    with pytest.raises(InputError, match=r"500 pictures \(100 of them fit temperatures\).* needs at least 3744,"):
        certify_bundle(bundle, samples, Promise(0.001, 0.05))
    with pytest.raises(InputError, match=r"500 pictures: .* needs at least 2995,"):
        certify_bundle(bundle, samples, Promise(0.001, 0.05), labelled=False)
    assert contents(bundle) == before


def test_nothing_to_certify(bundle: Path, tmp_path: Path) -> None:
    """Pictures on which the device is wrong whatever its confidence: refused, nothing written."""
    images = idx.read(FASHION / "samples" / "images-idx3-ubyte.gz", 3)
    family = Family.load(bundle)
    mean, std = family.preprocess.mean[0], family.preprocess.std[0]
    batch = ((images[:, None] / 255 - mean) / std).astype(np.float32)
    device, *_, cloud = measure.run_coded(family, measure.in_batches(batch))
    differs = device.logits.argmax(1) != cloud.logits.argmax(1)
    assert differs.sum() >= 5
    chosen = np.resize(np.flatnonzero(differs), 100)
    hard = tmp_path / "hard"
    hard.mkdir()
    idx.write(hard / "images-idx3-ubyte", images[chosen])
    idx.write(hard / "labels-idx1-ubyte", cloud.logits.argmax(1)[chosen].astype(np.uint8))
    before = contents(bundle)
    with pytest.raises(InputError, match=r"no threshold keeps an answer at a gap risk <= 0\.05.*larger epsilon"):
        certify_bundle(bundle, hard, Promise(0.05, 0.05), only="device")
    assert contents(bundle) == before


def test_refused_flags(bundle: Path, samples: Path, tmp_path: Path) -> None:
    """The last exit has nothing above it, a folder of something else is never replaced, a .zip is not written."""
    with pytest.raises(SettingsError, match=r"--exit 'cloud': the exits below the last one, 'cloud', are \['device'"):
        certify_bundle(bundle, samples, PROMISE, only="cloud")
    (tmp_path / "mine").mkdir()
    with pytest.raises(SettingsError, match="is no bundle: it would be replaced"):
        certify_bundle(bundle, samples, PROMISE, out=tmp_path / "mine")
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", bundle)
    with pytest.raises(SettingsError, match=r"is a \.zip: unpack it"):
        certify_bundle(Path(packed), samples, PROMISE)


def test_command(bundle: Path, samples: Path, tmp_path: Path) -> None:
    """One JSON object with before and after; the table has both too; a wrong epsilon is one line."""
    out = tmp_path / "out"
    words = ["certify", str(bundle), "--data", str(samples), "--epsilon", "0.02", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures["images"] == IMAGES
    assert set(figures["before"]) == set(figures["after"]) == {"device", "edge", "cloud"}
    assert figures["after"]["device"]["threshold"] == Family.load(out).manifest.exits["device"].threshold
    assert Family.load(bundle).manifest.exits["device"].certificate != figures["after"]
    shown = CliRunner().invoke(app, [*words, "--unlabelled", "--exit", "edge"])
    assert "before" in shown.stdout
    assert "as the largest member says" in shown.stdout
    wrong = CliRunner().invoke(app, ["certify", str(bundle), "--data", str(samples), "--epsilon", "1"])
    assert wrong.exit_code == 2
    assert "--epsilon is 1.0, expected a number between 0 and 1" in wrong.output
