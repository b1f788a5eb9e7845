"""What a bundle does to images: logits and bytes of every tier, through the graphs and codecs that ship."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kinflow.family import INPUT, Family, Member

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BATCH = 100
WARM_RUNS = 50
TIMED_RUNS = 400


@dataclass(frozen=True)
class TierRun:
    """One member continuing from what the tier below sent (the first one: from the input)."""

    member: str
    exit: str
    logits: Array
    """[n, classes]"""
    features: Array | None
    """What it would send on, before coding; None at the last tier."""
    split: str | None
    bytes_up: npt.NDArray[np.int64]
    """Coded size of what it received, per item; zeros at the first tier."""


def tiers(family: Family) -> list[str]:
    """Members, smallest first."""
    return sorted(family.manifest.members, key=lambda name: len(family.manifest.members[name].segments))


def run_coded(family: Family, inputs: Array, bits: int | None = None, threads: int = 2) -> list[TierRun]:
    """All items through all tiers, features quantised, coded and decoded at every hop.

    `bits`: 4 or 8 takes the codec `<split>-q<bits>`, None each split's default one.
    """
    runs: list[TierRun] = []
    source, batch, sizes = INPUT, inputs, np.zeros(len(inputs), np.int64)
    for name in tiers(family):
        run = _run(family.member(name, source=source, threads=threads), batch, sizes)
        runs.append(run)
        if run.split is None or run.features is None:
            break
        codec = family.codec(run.split, f"{run.split}-q{bits}" if bits else "")
        coded = [codec.encode(item) for item in run.features]
        source, batch = run.split, np.stack([codec.decode(data) for data in coded])
        sizes = np.array([len(data) for data in coded])
    return runs


def run_full_precision(family: Family, name: str, inputs: Array, threads: int = 2) -> Array:
    """A member's logits when one machine runs it from the input, nothing quantised on the way."""
    return _run(family.member(name, threads=threads), inputs, np.zeros(len(inputs), np.int64)).logits


def top1(logits: Array, labels: Labels) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == labels).mean())


def latency_s(member: Member, item: Array) -> float:
    """Median time of one item."""
    times = []
    for run in range(WARM_RUNS + TIMED_RUNS):
        begin = time.perf_counter()
        member.run(item)
        if run >= WARM_RUNS:
            times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _run(member: Member, batch: Array, sizes: npt.NDArray[np.int64]) -> TierRun:
    outputs = [member.run(batch[begin : begin + BATCH]) for begin in range(0, len(batch), BATCH)]
    kept = [output.features for output in outputs if output.features is not None]
    return TierRun(
        member.name,
        outputs[0].exit,
        np.concatenate([output.logits for output in outputs]),
        np.concatenate(kept) if kept else None,
        outputs[0].split,
        sizes,
    )
