"""Temperatures, thresholds and certificates of a bundle's exits, through its own graphs and codecs."""

from __future__ import annotations

from kinflow.confidence import probabilities
from kinflow.family import Family
from kinflow.manifest import Certificate, Exit
from kinflow_builder import measure
from kinflow_builder.calibrate import certify, gap, temperature
from kinflow_builder.data import Labels
from kinflow_builder.log import BuildLog
from kinflow_builder.measure import Array
from kinflow_builder.recipe import Recipe

# These of the held-out images fit temperatures; a certificate must not have seen its own images before.
TEMPERATURE_SHARE = 0.2


def calibrated_exits(
    family: Family, recipe: Recipe, inputs: Array, labels: Labels, data_sha256: str, log: BuildLog
) -> dict[str, Exit]:
    """`inputs` and `labels`: held-out images, `data_sha256` of all of them.

    An exit's certificate holds as if every image came to it, so it also holds for those that the exits before
    it pass on, and the risks of a chain of exits add up to at most the sum of their epsilons.
    """
    runs = measure.run_coded(family, inputs)
    cut = int(len(labels) * TEMPERATURE_SHARE)
    last = runs[-1].logits[cut:]
    exits = {}
    for run in runs:
        fitted = round(temperature(run.logits[:cut], labels[:cut]), 4)
        found = Exit(temperature=fitted, threshold=0.0, accuracy=0.0)
        promise = recipe.exits.get(run.exit)
        if promise is not None:
            confidence = probabilities(run.logits[cut:], fitted).max(axis=1)
            losses = gap(run.logits[cut:], last, labels[cut:])
            result = certify(confidence, losses, promise.epsilon, promise.delta)
            certificate = Certificate(
                threshold=result.threshold,
                epsilon=promise.epsilon,
                delta=promise.delta,
                n=result.n,
                risk="gap",
                kept_share=result.kept_share,
                data_sha256=data_sha256,
            )
            found = Exit(fitted, result.threshold, 0.0, certificate)
        exits[run.exit] = found
        log.line(f"exit {run.exit}: temperature {fitted}, threshold {found.threshold}, {_promise(found)}")
    return exits


def _promise(exit: Exit) -> str:
    if exit.certificate is None:
        return "keeps every answer"
    kept = 100 * exit.certificate.kept_share
    return f"keeps {kept:.1f}% at a gap <= {exit.certificate.epsilon} (delta {exit.certificate.delta})"
