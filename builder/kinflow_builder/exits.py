"""Temperatures, thresholds and certificates of a bundle's exits, from what its own graphs and codecs did to images.

`kinflow build` makes a family's first ones by it, `kinflow certify` new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.confidence import probabilities
from kinflow.manifest import Certificate, Exit
from kinflow_builder.calibrate import Certified, Losses, certify, gap, inconsistency, temperature
from kinflow_builder.measure import Labels, TierRun
from kinflow_builder.recipe import Exit as Promise

Risk = Literal["gap", "consistency"]

# These of the images fit temperatures; a certificate must not have seen its own images before.
TEMPERATURE_SHARE = 0.2
DIVISION_SEED = 0


def divided(count: int, *, labelled: bool) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(images that fit temperatures, images that certify). At random, because folders are sorted by class.

    Without labels no temperature is fitted, and all images certify.
    """
    cut = int(count * TEMPERATURE_SHARE) if labelled else 0
    order = np.random.default_rng(DIVISION_SEED).permutation(count)
    return order[:cut], order[cut:]


def calibrated_exits(
    before: Mapping[str, Exit],
    runs: Sequence[TierRun],
    labels: Labels | None,
    promises: Mapping[str, Promise],
    data_sha256: str,
) -> dict[str, Exit]:
    """`runs`: all tiers on images never trained on, the largest member last. `data_sha256` of those images.

    An exit in `promises` gets a threshold for its epsilon and delta; where none can be certified that keeps an
    answer, the threshold is 1 and there is no certificate. Another exit keeps its threshold. With `labels` the
    risk is the gap, and temperatures are fitted, but not to an exit that keeps a certificate made with its old one.
    Without, the risk is inconsistency, and temperatures stay.

    A certificate holds as if every image came to the exit, so it also holds for those that the exits before
    it pass on, and the risks of a chain of exits add up to at most the sum of their epsilons.
    """
    fitting, certifying = divided(len(runs[-1].logits), labelled=labels is not None)
    found = dict(before)
    for run in runs:
        exit, promise = before[run.exit], promises.get(run.exit)
        if labels is not None and (promise is not None or exit.certificate is None) and len(fitting):
            fitted = round(temperature(run.logits[fitting], labels[fitting]), 4)
            exit = msgspec.structs.replace(exit, temperature=fitted)
        if promise is not None:
            confidence = probabilities(run.logits[certifying], exit.temperature).max(axis=1)
            losses = losses_of(run, runs[-1], labels)[certifying]
            result = certify(confidence, losses, promise.epsilon, promise.delta)
            risk: Risk = "consistency" if labels is None else "gap"
            exit = _with(exit, result, promise, risk, data_sha256)
        found[run.exit] = exit
    return found


def losses_of(run: TierRun, last: TierRun, labels: Labels | None) -> Losses:
    """What keeping each answer of `run` would cost: the gap with labels, inconsistency without."""
    return inconsistency(run.logits, last.logits) if labels is None else gap(run.logits, last.logits, labels)


def describe(exit: Exit) -> str:
    """One line for a log."""
    text = f"temperature {exit.temperature}, threshold {exit.threshold}"
    if exit.certificate is None:
        return f"{text}, " + ("keeps every answer" if exit.threshold == 0 else "nothing certified")
    given = exit.certificate
    kept = 100 * given.kept_share
    return f"{text}, keeps {kept:.1f}% at a {given.risk} risk <= {given.epsilon} (delta {given.delta}, n {given.n})"


def _with(exit: Exit, result: Certified, promise: Promise, risk: Risk, data_sha256: str) -> Exit:
    if result.kept_share == 0:
        return msgspec.structs.replace(exit, threshold=1.0, certificate=None)
    certificate = Certificate(
        threshold=result.threshold,
        epsilon=promise.epsilon,
        delta=promise.delta,
        n=result.n,
        risk=risk,
        kept_share=result.kept_share,
        data_sha256=data_sha256,
    )
    return msgspec.structs.replace(exit, threshold=result.threshold, certificate=certificate)
