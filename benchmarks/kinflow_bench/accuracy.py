"""`bench accuracy`: every member on the test images, fed with the device's own coded features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinflow.family import Family
from kinflow_builder import data, measure


def run(folder: Path, directory: Path | None) -> dict[str, Any]:
    """Top-1 in percent of the bundle in `folder` on its recipe's test images; `directory` may hold them."""
    family = Family.load(folder / "bundle")
    test = data.load_test(folder, directory)
    inputs = data.preprocess(test.images, family.preprocess)
    coded = measure.run_coded(family, inputs)
    figures: dict[str, Any] = {run.member: 100.0 * measure.top1(run.logits, test.labels) for run in coded}
    for name in measure.tiers(family)[1:]:
        logits = measure.run_full_precision(family, name, inputs)
        figures[f"{name}_full_precision"] = 100.0 * measure.top1(logits, test.labels)
    return {
        **figures,
        "images": len(test.labels),
        "feature_bytes_mean": {run.member: float(run.bytes_up.mean()) for run in coded[1:]},
    }
