"""`bench accuracy`: every member on the test images, fed with the device's own coded features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinflow.family import INPUT, Family
from kinflow_bench.data import load
from kinflow_builder import measure
from kinflow_builder.folders import Pictures
from kinflow_builder.service import cascade


def run(folder: Path, directory: Path | None) -> dict[str, Any]:
    """Top-1 in percent of the family in `folder` on its recipe's test images, or on those in `directory`."""
    family, pictures = load(folder, directory)
    runs = measure.run_coded(family, pictures.batches(family.preprocess))
    service = cascade(family.manifest.exits, runs, pictures.truth)
    coded = {run.member: 100.0 * measure.top1(run.logits, pictures.truth) for run in runs}
    full = {}
    for name in list(coded)[1:]:
        logits = measure.run_full_precision(family, name, pictures.batches(family.preprocess))
        full[name] = 100.0 * measure.top1(logits, pictures.truth)
    return {
        **coded,
        **{f"{name}_full_precision": top1 for name, top1 in full.items()},
        "overall": 100.0 * service.top1,
        "local_share": 100.0 * service.shares[runs[0].member],
        "shares": {name: 100.0 * share for name, share in service.shares.items()},
        "feature_bytes_mean": float(runs[1].bytes_up.mean()) if len(runs) > 1 else 0.0,
        "bytes_per_image": service.bytes_mean,
        "tail_loss_points": max((full[name] - coded[name] for name in full), default=0.0),
        "codecs": _codecs(family, pictures, full),
        "images": len(pictures),
    }


def _codecs(family: Family, pictures: Pictures, full: dict[str, float]) -> dict[str, dict[str, float]]:
    """The same at every rate of the device's split: what slow links, or settings, may choose."""
    figures: dict[str, dict[str, float]] = {}
    split = next((source for source in measure.sources(family.manifest).values() if source != INPUT), None)
    if split is None:
        return figures
    for codec in family.manifest.splits[split].codecs:
        runs = measure.run_coded(family, pictures.batches(family.preprocess), {split: codec})
        above = {run.member: 100.0 * measure.top1(run.logits, pictures.truth) for run in runs[1:]}
        loss = max(full[name] - top1 for name, top1 in above.items())
        figures[codec] = {**above, "feature_bytes_mean": float(runs[1].bytes_up.mean()), "tail_loss_points": loss}
    return figures
