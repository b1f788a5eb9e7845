"""What a family does on its test images: the numbers of its card. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinflow.family import Family
from kinflow_builder import curves, latency, measure
from kinflow_builder.bdrate import BdRate, bd_rate
from kinflow_builder.curves import FeaturePoint, ImageKind, ImagePoint
from kinflow_builder.folders import Pictures
from kinflow_builder.latency import Times
from kinflow_builder.log import BuildLog
from kinflow_builder.measure import TierRun
from kinflow_builder.service import Cascade, cascade

# Images for the curves: the baselines are some forty runs of the largest member.
CURVE_IMAGES = 2000
THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)


@dataclass(frozen=True)
class Figures:
    """Shares are between 0 and 1; per exit unless said otherwise."""

    images: int
    coded: dict[str, float]
    """Top-1, features quantised and coded on the way."""
    full_precision: dict[str, float]
    """Top-1 where one machine runs the member and nothing is quantised."""
    tflite: dict[str, float]
    """Top-1 of the first member on TFLite."""
    feature_bytes: dict[str, float]
    """Mean coded size per split, its default codec."""
    raw_bytes: float
    png_bytes: float
    runs: list[TierRun]
    cascade: Cascade
    curve_images: int
    """Of the test images, those of all that follows."""
    curve_cascade: Cascade
    sweep: list[Cascade]
    """`THRESHOLDS` at all exits but the last one."""
    features: list[FeaturePoint]
    """All images to the largest member, as the files."""
    files: dict[ImageKind, list[ImagePoint]]
    bd: dict[ImageKind, BdRate]
    """Of the features against each kind of file."""
    times: Times


def measure_all(family: Family, test: Pictures, log: BuildLog) -> Figures:
    """`test`: labelled images that nothing was trained on or fitted to."""
    spec = family.preprocess
    runs = measure.run_coded(family, test.batches(spec))
    full = {
        run.exit: measure.top1(measure.run_full_precision(family, run.member, test.batches(spec)), test.truth)
        for run in runs
    }
    coded = {run.exit: measure.top1(run.logits, test.truth) for run in runs}
    for exit, share in coded.items():
        log.line(f"test top-1 {exit}: {100 * share:.2f} coded, {100 * full[exit]:.2f} full precision")
    chosen = curves.sample(len(test), CURVE_IMAGES)
    few, few_runs = test.part(chosen), measure.part(runs, chosen)
    features = curves.feature_curve(family, few)
    kinds: tuple[ImageKind, ...] = ("JPEG", "WEBP")
    files = {kind: curves.image_curve(family, few, kind) for kind in kinds}
    images = [image for image, _ in few.read(spec)]
    found = Figures(
        images=len(test),
        coded=coded,
        full_precision=full,
        tflite=_tflite(family, test),
        feature_bytes={run.source: float(run.bytes_up.mean()) for run in runs[1:]},
        raw_bytes=float(images[0].nbytes),
        png_bytes=float(np.mean([len(curves.encode(image, "PNG", optimize=True)) for image in images])),
        runs=runs,
        cascade=cascade(family.manifest.exits, runs, test.truth),
        curve_images=len(few),
        curve_cascade=cascade(family.manifest.exits, few_runs, few.truth),
        sweep=[cascade(family.manifest.exits, few_runs, few.truth, threshold) for threshold in THRESHOLDS],
        features=features,
        files=files,
        bd={kind: bd_rate(features, points) for kind, points in files.items()} if features else {},
        times=latency.measured(family, images[0], next(few.batches(spec, 1))),
    )
    for line in _lines(found):
        log.line(line)
    return found


def _lines(found: Figures) -> list[str]:
    service = found.cascade
    shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in service.shares.items())
    lines = [f"in service: {shares}; top-1 {100 * service.top1:.2f}, {service.bytes_mean:.1f} bytes per image"]
    for kind, rate in found.bd.items():
        figure = "undefined" if rate.percent is None else f"{rate.percent:.1f}%"
        lines.append(f"BD-rate against {kind}: {figure} between top-1 {100 * rate.low:.2f} and {100 * rate.high:.2f}")
    return lines


def _tflite(family: Family, test: Pictures) -> dict[str, float]:
    """Of the first member, if it has such graphs."""
    name, member = next(iter(family.manifest.members.items()))
    segments = [family.manifest.segments[segment] for segment in member.segments]
    if any("tflite" not in segment.graphs for segment in segments):
        return {}
    logits = measure.run_full_precision(family, name, test.batches(family.preprocess), "tflite")
    return {str(segments[-1].exit): measure.top1(logits, test.truth)}
