"""`bench certificate`: how often a certified threshold breaks its promise, over many random calibration samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.confidence import probabilities
from kinflow.errors import InputError, SettingsError
from kinflow.manifest import Exit
from kinflow_bench.data import load
from kinflow_builder import measure
from kinflow_builder.calibrate import Losses, certify, fewest
from kinflow_builder.exits import losses_of

DEFAULT_EPSILON = 0.01
DEFAULT_DELTA = 0.05
SEED = 0

Confidence = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """Over all splits, of one exit. Shares are between 0 and 1."""

    violations: int
    """Splits whose threshold has a risk above epsilon on the whole population, where it is known exactly."""
    halves_above: int
    """Splits into disjoint halves where the other half's own share of losses is above epsilon."""
    kept_share: float
    """Mean over the splits, of the population."""


def run(
    folder: Path, directory: Path | None, splits: int, epsilon: float | None, delta: float | None
) -> dict[str, Any]:
    """Of each exit but the last one, with its own certificate's epsilon and delta unless others are given.

    Raises InputError where half of the images cannot certify anything.
    """
    family, pictures = load(folder, directory)
    names = measure.exits(family.manifest)
    if len(names) < 2:
        raise SettingsError(f"{family.id} has one exit: there is no answer to certify against a larger one")
    first = _promise(family.manifest.exits[names[0]], epsilon, delta)
    runs = measure.run_coded(family, pictures.batches(family.preprocess))
    found = {}
    for run_ in runs[:-1]:
        exit = family.manifest.exits[run_.exit]
        promise = _promise(exit, epsilon, delta)
        confidence = probabilities(run_.logits, exit.temperature).max(axis=1)
        losses = losses_of(run_, runs[-1], pictures.truth)
        tally = tallied(confidence, losses, *promise, splits)
        found[run_.exit] = {"epsilon": promise[0], "delta": promise[1], **_figures(tally, splits)}
    return {
        "epsilon": first[0],
        "delta": first[1],
        "splits": splits,
        **found[names[0]],
        "allowed_share": first[1] + 2 * math.sqrt(first[1] * (1 - first[1]) / splits),
        "calibration_images": len(pictures) // 2,
        "images": len(pictures),
        "exits": found,
    }


def tallied(confidence: Confidence, losses: Losses, epsilon: float, delta: float, splits: int) -> Tally:
    """The images are the population: what a threshold risks on all of them is its true risk, without noise.

    Each split draws half as many images as there are, with replacement, so that they are independent draws from
    that population, and certifies on them. For `halves_above` it divides the images into two disjoint halves.
    Raises InputError where half of the images are too few for epsilon and delta.
    """
    count = len(losses)
    half = count // 2
    needed = fewest(epsilon, delta)
    if half < needed:
        raise InputError(
            f"half of {count} images calibrates, epsilon {epsilon} with delta {delta} needs {needed}: "
            "give more images with --data, or a larger --epsilon"
        )
    random = np.random.default_rng(SEED)
    violations = halves_above = 0
    kept = 0.0
    for _ in range(splits):
        drawn = random.integers(0, count, half)
        sure = confidence >= certify(confidence[drawn], losses[drawn], epsilon, delta).threshold
        violations += bool((sure & losses).mean() > epsilon)
        kept += float(sure.mean())
        order = random.permutation(count)
        one, other = order[:half], order[half:]
        sure = confidence[other] >= certify(confidence[one], losses[one], epsilon, delta).threshold
        halves_above += bool((sure & losses[other]).mean() > epsilon)
    return Tally(violations, halves_above, kept / splits)


def _promise(exit: Exit, epsilon: float | None, delta: float | None) -> tuple[float, float]:
    given = exit.certificate
    own = (DEFAULT_EPSILON, DEFAULT_DELTA) if given is None else (given.epsilon, given.delta)
    return (own[0] if epsilon is None else epsilon, own[1] if delta is None else delta)


def _figures(tally: Tally, splits: int) -> dict[str, Any]:
    return {
        "violations": tally.violations,
        "violations_share": tally.violations / splits,
        "halves_above_share": tally.halves_above / splits,
        "local_share": 100.0 * tally.kept_share,
    }
