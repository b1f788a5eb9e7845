"""New thresholds and certificates for a bundle, from a user's own pictures. Trains nothing, needs no torch."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kinflow.bundle import MANIFEST
from kinflow.confidence import probabilities
from kinflow.errors import InputError, SettingsError
from kinflow.family import Family
from kinflow.manifest import Exit, Manifest
from kinflow_builder import bundle, card, folders, measure
from kinflow_builder.calibrate import Labels, fewest
from kinflow_builder.exits import TEMPERATURE_SHARE, calibrated_exits, divided, losses_of
from kinflow_builder.measure import TierRun
from kinflow_builder.recipe import Exit as Promise
from kinflow_builder.service import Cascade, cascade


@dataclass(frozen=True)
class State:
    """One exit as it was or is now, on the pictures that certify. Shares are between 0 and 1."""

    temperature: float
    threshold: float
    kept_share: float
    risk: float
    """Share of the pictures whose answer is kept and is a loss."""


@dataclass(frozen=True)
class Report:
    """What changed."""

    images: int
    certified_with: int
    """Of them; the others fitted the temperatures."""
    risk: str
    """gap or consistency"""
    data_sha256: str
    before: dict[str, State]
    after: dict[str, State]
    service_before: Cascade
    """All tiers together, on all pictures; right is, without labels, what the largest member says."""
    service_after: Cascade


def certify_bundle(
    path: Path, data: Path, promise: Promise, *, only: str | None = None, labelled: bool = True, out: Path | None = None
) -> Report:
    """Writes `out`, or the bundle itself, with new certificates of all exits but the last one, or of `only`.

    Raises SettingsError for a flag that does not fit the bundle, InputError for pictures that do not fit it or are
    too few or too hard for `promise`. After an error everything is as it was.
    """
    family = Family.load(path)
    target = _target(path, out)
    names = _exits(family.manifest, only)
    pictures = folders.find(data, family.labels, labelled=labelled)
    _, certifying = divided(len(pictures), labelled=labelled)
    _check_count(data, len(pictures), len(certifying), promise, labelled=labelled)
    runs = measure.run_coded(family, pictures.batches(family.preprocess))
    digest = pictures.sha256()
    before = family.manifest.exits
    after = calibrated_exits(before, runs, pictures.labels, dict.fromkeys(names, promise), digest)
    report = _report(before, after, runs, pictures.labels, digest)
    for name in names:
        if after[name].certificate is None:
            risk = report.before[name].risk
            raise InputError(
                f"exit {name!r}: no threshold keeps an answer at a {report.risk} risk <= {promise.epsilon} with "
                f"delta {promise.delta} on {len(certifying)} pictures (at its threshold now the risk is {risk:.4f}): "
                "give a larger epsilon or more pictures, or certify another exit alone (--exit)"
            )
    manifest = msgspec.structs.replace(family.manifest, exits=after)
    with bundle.staged(target) as stage:
        shutil.copytree(path, stage, dirs_exist_ok=True)
        bundle.write_manifest(stage, manifest)
        card.write_certified(stage, manifest, names)
    return report


def _target(path: Path, out: Path | None) -> Path:
    if not path.is_dir():
        raise SettingsError(f"{path} is a .zip: unpack it and give the folder, which is then written anew")
    # A link to a bundle stays a link.
    target = (out or path).resolve()
    if target.exists() and not (target / MANIFEST).is_file():
        raise SettingsError(f"--out {target} is there and is no bundle: it would be replaced, give a new folder")
    if not os.access(next(folder for folder in target.parents if folder.exists()), os.W_OK):
        raise SettingsError(f"{target.parent} cannot be written to: give another folder with --out")
    return target


def _exits(manifest: Manifest, only: str | None) -> list[str]:
    """Those to certify, the smallest member's first."""
    names = measure.exits(manifest)
    if only is None:
        if len(names) < 2:
            raise SettingsError(f"{manifest.id} has one exit, {names[0]!r}: there is no larger one to compare it with")
        return names[:-1]
    if only not in names[:-1]:
        raise SettingsError(f"--exit {only!r}: the exits below the last one, {names[-1]!r}, are {names[:-1]}")
    return [only]


def _check_count(data: Path, count: int, certifying: int, promise: Promise, *, labelled: bool) -> None:
    needed = fewest(promise.epsilon, promise.delta)
    if certifying >= needed:
        return
    total = math.ceil(needed / (1 - TEMPERATURE_SHARE)) if labelled else needed
    aside = f" ({count - certifying} of them fit temperatures)" if labelled else ""
    raise InputError(
        f"{data} has {count} pictures{aside}: epsilon {promise.epsilon} with delta {promise.delta} needs at least "
        f"{total}, and more where answers are wrong; give more pictures, or a larger epsilon or delta"
    )


def _report(
    before: dict[str, Exit], after: dict[str, Exit], runs: Sequence[TierRun], labels: Labels | None, digest: str
) -> Report:
    right = runs[-1].logits.argmax(1) if labels is None else labels
    count = len(right)
    return Report(
        images=count,
        certified_with=len(divided(count, labelled=labels is not None)[1]),
        risk="consistency" if labels is None else "gap",
        data_sha256=digest,
        before={run.exit: _state(before[run.exit], run, runs[-1], labels) for run in runs},
        after={run.exit: _state(after[run.exit], run, runs[-1], labels) for run in runs},
        service_before=cascade(before, runs, right),
        service_after=cascade(after, runs, right),
    )


def _state(exit: Exit, run: TierRun, last: TierRun, labels: Labels | None) -> State:
    _, chosen = divided(len(run.logits), labelled=labels is not None)
    kept = probabilities(run.logits[chosen], exit.temperature).max(axis=1) >= exit.threshold
    losses = losses_of(run, last, labels)[chosen]
    return State(exit.temperature, exit.threshold, float(kept.mean()), float((kept & losses).mean()))
