"""The card and its pictures, from what the committed bundle does to some of its samples."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pip install 'kinflow[builder]'")
pytest.importorskip("scipy", reason="pip install 'kinflow[builder]'")
from PIL import Image
from rich.console import Console

from kinflow.family import Family
from kinflow.manifest import Manifest
from kinflow_builder import card, figures, folders, latency
from kinflow_builder.figures import Figures
from kinflow_builder.latency import TO_THE_CLOUD, Link
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Recipe

pytestmark = pytest.mark.usefixtures("brief_timing")

FASHION = Path(__file__).parents[1] / "families" / "fashion"
IMAGES = 80


@pytest.fixture(scope="module")
def family() -> Family:
    return Family.load(FASHION / "bundle")


@pytest.fixture(scope="module")
def found(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Measured once for all tests."""
    log = BuildLog(tmp_path_factory.mktemp("log") / "log", Console(file=io.StringIO()))
    samples = folders.find(FASHION / "samples", family.labels)
    return figures.measure_all(family, samples.part(np.arange(IMAGES)), log)


def stated(manifest: Manifest) -> Manifest:
    """The device's graphs in floats, the servers' in 16 bits."""
    raw = msgspec.to_builtins(manifest)
    for name, segment in raw["segments"].items():
        for graph in segment["graphs"].values():
            graph["precision"] = "float" if name == "device" else "half"
    return msgspec.convert(raw, Manifest)


def test_card_and_pictures(family: Family, found: Figures, tmp_path: Path) -> None:
    """Every section is there, the pictures are pictures, and figures are those measured and the manifest's."""
    card.write(tmp_path, stated(family.manifest), Recipe.load(FASHION), found)
    text = (tmp_path / "card.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Members",
        "Features",
        "Accuracy over bytes",
        "Accuracy over latency",
        "Exits",
        "Files",
        "Reproduce",
    ]
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert pictures == ["accuracy_over_bytes.png", "accuracy_over_latency.png"]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    for exit, top1 in found.coded.items():
        assert f"| {exit} | {100 * top1:.2f}% |" in text
    for name, exit in family.manifest.exits.items():
        assert f"| {name} | {exit.temperature:.3f} | {exit.threshold:.3f} |" in text
    for link in latency.LINKS:
        assert f"| {link.text} |" in text
    assert re.search(r"\| device.onnx \| [\d.]+ \| 32-bit floats \|", text)
    assert re.search(r"\| edge.onnx \| [\d.]+ \| weights in 16 bits, arithmetic in floats \|", text)
    assert f"against JPEG {found.bd['JPEG'].percent:+.1f}%" in text


def test_service_is_cheaper_than_files_only_where_it_says_so(found: Figures) -> None:
    """The latency of the family is its parts, added by hand; with all kept, it is the device's alone."""
    link = Link("test", 1.0, 8000.0)
    times = found.times
    device, edge, cloud = found.runs
    kept = found.sweep[0]
    assert latency.of_family(times, found.runs, kept, link) == pytest.approx(times.member_s["device"])
    service = found.sweep[-1]
    hop_1 = (
        service.reached["edge"] * (times.encode_s["s1"] + 1.0 + times.decode_s["s1"] + times.member_s["edge"])
        + service.hop_bytes["edge"] / 1000
    )
    hop_2 = (
        service.reached["cloud"]
        # The edge server forwards what came: it encodes nothing.
        * (TO_THE_CLOUD.rtt_s + times.decode_s["s1"] + times.member_s["cloud"])
        + 8 * service.hop_bytes["cloud"] / TO_THE_CLOUD.bits_per_s
    )
    total = times.member_s["device"] + hop_1 + hop_2
    assert latency.of_family(times, [device, edge, cloud], service, link) == pytest.approx(total)


def test_files_take_both_ways(found: Figures) -> None:
    """An image file travels to the edge and on to the cloud, and the cloud's member runs whole."""
    point = found.files["JPEG"][0]
    expected = (
        found.times.image_s["JPEG"]
        + (1.0 + point.bytes_mean / 1000)
        + TO_THE_CLOUD.seconds(point.bytes_mean)
        + found.times.whole_s
    )
    assert latency.of_images(found.times, point, "JPEG", Link("test", 1.0, 8000.0)) == pytest.approx(expected)


def test_curves_are_of_all_images(family: Family, found: Figures) -> None:
    """Each codec and each setting is a point; better files are larger and, at the best, as good as the pixels."""
    assert {point.codec for point in found.features} == set(family.manifest.splits["s1"].codecs)
    files = found.files["JPEG"]
    assert len(files) == 19
    full = [point for point in files if point.height == 28]
    assert [point.bytes_mean for point in full] == sorted(point.bytes_mean for point in full)
    assert abs(full[-1].top1 - found.full_precision["cloud"]) <= 2 / IMAGES
    (exact,) = [point for point in found.files["WEBP"] if point.lossless]
    assert exact.top1 == found.full_precision["cloud"]
    assert found.curve_cascade == found.cascade
    assert found.sweep[0].top1 == found.coded["device"]
