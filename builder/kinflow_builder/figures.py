"""What a family does on its test images: the numbers of its card. No torch."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from kinflow.confidence import probabilities
from kinflow.family import INPUT, Family
from kinflow_builder import measure
from kinflow_builder.data import Images, LabelledImages, preprocess
from kinflow_builder.log import BuildLog
from kinflow_builder.measure import Array, TierRun

JPEG_QUALITIES = (5, 15, 30, 50, 75, 90)
JPEG_QUALITY = 75
# Images for the plot's JPEG line: each quality is one run of the whole chain.
CURVE_IMAGES = 2000


@dataclass(frozen=True)
class Point:
    """Mean bytes sent per image, and the share of right answers."""

    bytes_mean: float
    top1: float


@dataclass(frozen=True)
class Cascade:
    """All exits with their thresholds, as in service."""

    shares: dict[str, float]
    """Share of the images that each exit answers."""
    top1: float
    bytes_mean: float
    """Sent per image, over all hops and all images."""


@dataclass(frozen=True)
class Figures:
    """Shares are between 0 and 1; per exit unless said otherwise."""

    images: int
    coded: dict[str, float]
    """Top-1, features quantised and coded on the way."""
    coded_q8: dict[str, float]
    full_precision: dict[str, float]
    """Top-1 where one machine runs the member and nothing is quantised."""
    tflite: dict[str, float]
    """Top-1 of the first member on TFLite."""
    feature_bytes: dict[str, float]
    """Mean coded size per split."""
    feature_bytes_q8: dict[str, float]
    raw_bytes: float
    png_bytes: float
    jpeg_bytes: float
    cascade: Cascade
    curve: list[Point]
    """Other thresholds of the same family."""
    jpeg_curve: list[Point]
    """The last member on images that came as JPEG, `CURVE_IMAGES` of them."""
    latency_s: dict[str, float]
    """Median of the first member, one image, one thread, per backend."""


def measure_all(family: Family, test: LabelledImages, inputs: Array, log: BuildLog) -> Figures:
    """`inputs`: the preprocessed `test` images."""
    runs = measure.run_coded(family, inputs)
    fine = measure.run_coded(family, inputs, bits=8)
    names = {run.exit: run.member for run in runs}
    full = {
        exit: measure.top1(measure.run_full_precision(family, name, inputs), test.labels)
        for exit, name in names.items()
    }
    coded = _top1(runs, test)
    for exit, share in coded.items():
        log.line(f"test top-1 {exit}: {100 * share:.2f} coded, {100 * full[exit]:.2f} full precision")
    found = Figures(
        images=len(test.labels),
        coded=coded,
        coded_q8=_top1(fine, test),
        full_precision=full,
        tflite=_tflite(family, test, inputs),
        feature_bytes=_sizes(runs),
        feature_bytes_q8=_sizes(fine),
        raw_bytes=float(test.images[0].nbytes),
        png_bytes=_mean_size(test.images, "PNG", optimize=True),
        jpeg_bytes=_mean_size(test.images, "JPEG", quality=JPEG_QUALITY),
        cascade=cascade(family, runs, test, {}),
        curve=_curve(family, runs, test),
        jpeg_curve=_jpeg_curve(family, runs[-1].member, test.part(slice(0, CURVE_IMAGES))),
        latency_s=_latencies(family, runs[0].member, inputs[:1]),
    )
    service = found.cascade
    shares = ", ".join(f"{exit} {100 * share:.1f}%" for exit, share in service.shares.items())
    log.line(f"in service: {shares}; top-1 {100 * service.top1:.2f}, {service.bytes_mean:.1f} bytes per image")
    return found


def cascade(family: Family, runs: list[TierRun], test: LabelledImages, thresholds: dict[str, float]) -> Cascade:
    """Each image leaves at the first exit that is sure; `thresholds` go before the manifest's own."""
    waiting = np.ones(len(test.labels), bool)
    right = np.zeros(len(test.labels), bool)
    sent = np.zeros(len(test.labels), np.int64)
    shares = {}
    for run in runs:
        sent[waiting] += run.bytes_up[waiting]
        exit = family.manifest.exits[run.exit]
        confidence = probabilities(run.logits, exit.temperature).max(axis=1)
        kept = waiting & (confidence >= thresholds.get(run.exit, exit.threshold))
        right[kept] = (run.logits.argmax(1) == test.labels)[kept]
        shares[run.exit] = float(kept.mean())
        waiting &= ~kept
    return Cascade(shares, float(right.mean()), float(sent.mean()))


def _top1(runs: list[TierRun], test: LabelledImages) -> dict[str, float]:
    return {run.exit: measure.top1(run.logits, test.labels) for run in runs}


def _sizes(runs: list[TierRun]) -> dict[str, float]:
    splits = [run.split for run in runs if run.split is not None]
    return {split: float(run.bytes_up.mean()) for split, run in zip(splits, runs[1:], strict=True)}


def _curve(family: Family, runs: list[TierRun], test: LabelledImages) -> list[Point]:
    """One threshold for all exits but the last, from none to all sent on."""
    points = []
    for threshold in (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995):
        result = cascade(family, runs, test, {run.exit: threshold for run in runs[:-1]})
        points.append(Point(result.bytes_mean, result.top1))
    return points


def _jpeg_curve(family: Family, member: str, test: LabelledImages) -> list[Point]:
    points = []
    for quality in JPEG_QUALITIES:
        files = [encode(image, "JPEG", quality=quality) for image in test.images]
        seen = np.stack([np.asarray(Image.open(io.BytesIO(raw)), np.uint8) for raw in files])
        logits = measure.run_full_precision(family, member, preprocess(seen, family.preprocess))
        points.append(Point(float(np.mean([len(raw) for raw in files])), measure.top1(logits, test.labels)))
    return points


def _mean_size(images: Images, kind: str, **options: int) -> float:
    return float(np.mean([len(encode(image, kind, **options)) for image in images]))


def encode(image: npt.NDArray[np.uint8], kind: str, **options: int) -> bytes:
    """The bytes of an image file, as Pillow writes it."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def _tflite(family: Family, test: LabelledImages, inputs: Array) -> dict[str, float]:
    """Of the first member, if it has such graphs."""
    name = measure.tiers(family)[0]
    if not _has_tflite(family, name):
        return {}
    member = family.member(name, backend="tflite", source=INPUT)
    output = member.run(inputs)
    return {output.exit: measure.top1(output.logits, test.labels)}


def _latencies(family: Family, name: str, item: Array) -> dict[str, float]:
    found = {"onnx": measure.latency_s(family.member(name), item)}
    if _has_tflite(family, name):
        found["tflite"] = measure.latency_s(family.member(name, backend="tflite"), item)
    return found


def _has_tflite(family: Family, name: str) -> bool:
    return all("tflite" in family.manifest.segments[part].graphs for part in family.manifest.members[name].segments)
