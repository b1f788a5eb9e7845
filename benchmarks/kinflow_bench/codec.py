"""`bench codec`: bytes at equal accuracy, features against image files, all of them to the largest member."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinflow.errors import SettingsError
from kinflow_bench.data import load
from kinflow_builder.bdrate import Point, bd_rate, front
from kinflow_builder.curves import ImageKind, feature_curve, image_curve, sample

KINDS: tuple[ImageKind, ...] = ("JPEG", "WEBP")


def run(folder: Path, directory: Path | None, images: int | None) -> dict[str, Any]:
    """BD-rates in percent and the curves they come from, on `images` of the test images, or all."""
    family, pictures = load(folder, directory)
    pictures = pictures.part(sample(len(pictures), images))
    features = feature_curve(family, pictures)
    if not features:
        raise SettingsError(f"{family.id}: no member continues from the split of the smallest one, nothing is sent")
    figures: dict[str, Any] = {}
    overlaps = {}
    curve = {"features": _points(features)}
    for kind in KINDS:
        files = image_curve(family, pictures, kind)
        rate = bd_rate(features, files)
        figures[f"bd_rate_{kind.lower()}"] = rate.percent
        overlaps[kind.lower()] = [100.0 * rate.low, 100.0 * rate.high]
        curve[kind.lower()] = _points(files)
    return {**figures, "compared_between": overlaps, "curve": curve, "images": len(pictures)}


def _points(points: list[Any]) -> list[dict[str, Any]]:
    """With top-1 in percent; `front`: it is part of the curve that is compared."""
    best: list[Point] = front(points)
    return [{**asdict(point), "top1": 100.0 * point.top1, "front": point in best} for point in points]
