"""What a bundle does to images: logits and bytes of every tier, through the graphs and codecs that ship.

Images come as batches and go through all tiers before the next batch is asked for, so that features never pile up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.errors import FamilyMismatch
from kinflow.family import INPUT, Family
from kinflow.manifest import BackendName, Manifest

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BATCH = 100
WARM_S = 0.05
TIMED_S = 0.5


@dataclass(frozen=True)
class TierRun:
    """One member continuing from what a tier below sent (the first one: from the input)."""

    member: str
    exit: str
    source: str
    """The split it continued from, or `input`."""
    logits: Array
    """[n, classes]"""
    bytes_up: npt.NDArray[np.int64]
    """Coded size of what it received, per item; zeros at the first tier."""


def part(runs: Sequence[TierRun], chosen: npt.NDArray[np.intp]) -> list[TierRun]:
    """The same runs of the images `chosen` alone."""
    return [replace(run, logits=run.logits[chosen], bytes_up=run.bytes_up[chosen]) for run in runs]


def sources(manifest: Manifest) -> dict[str, str]:
    """Where each member begins in service, smallest first: at the deepest split that a member below ends at.

    A member that continues from the split of a tier further down gets the bytes which that tier sent.
    Raises FamilyMismatch where a member has no such split on its way.
    """
    found: dict[str, str] = {}
    ends: set[str] = set()
    for name, member in manifest.members.items():
        segments = [manifest.segments[segment] for segment in member.segments]
        own = [segment.source for segment in segments if segment.source in ends] if found else [INPUT]
        if not own:
            raise FamilyMismatch(f"member {name!r} of {manifest.id} begins at no split at which a smaller one ends")
        found[name] = own[-1]
        if segments[-1].split is not None:
            ends.add(segments[-1].split)
    return found


def exits(manifest: Manifest) -> list[str]:
    """Of the members, the smallest one's first; each once."""
    ends = [manifest.segments[member.segments[-1]].exit for member in manifest.members.values()]
    return list(dict.fromkeys(exit for exit in ends if exit is not None))


def in_batches(inputs: Array) -> Iterator[Array]:
    """Preprocessed images [n, channels, height, width] that are in memory anyway."""
    for begin in range(0, len(inputs), BATCH):
        yield inputs[begin : begin + BATCH]


def run_coded(
    family: Family, batches: Iterable[Array], codecs: Mapping[str, str] | None = None, threads: int = 2
) -> list[TierRun]:
    """All images through all tiers, features quantised, coded and decoded at every hop.

    `codecs`: a codec's name by split; every other split uses its default one.
    """
    plan = sources(family.manifest)
    members = {name: family.member(name, source=source, threads=threads) for name, source in plan.items()}
    needed = {
        source: family.codec(source, (codecs or {}).get(source, "")) for source in plan.values() if source != INPUT
    }
    logits: dict[str, list[Array]] = {name: [] for name in plan}
    sizes: dict[str, list[int]] = {name: [] for name in plan}
    exits: dict[str, str] = {}
    for batch in batches:
        arrived = {INPUT: (batch, [0] * len(batch))}
        for name, source in plan.items():
            features, lengths = arrived[source]
            output = members[name].run(features)
            logits[name].append(output.logits)
            sizes[name] += lengths
            exits[name] = output.exit
            if output.split in needed and output.split not in arrived:
                assert output.features is not None  # Member.run: they come together
                codec = needed[output.split]
                coded = [codec.encode(item) for item in output.features]
                arrived[output.split] = np.stack([codec.decode(data) for data in coded]), [len(data) for data in coded]
    return [
        TierRun(name, exits[name], source, np.concatenate(logits[name]), np.asarray(sizes[name], np.int64))
        for name, source in plan.items()
    ]


def run_full_precision(
    family: Family, name: str, batches: Iterable[Array], backend: BackendName = "onnx", threads: int = 2
) -> Array:
    """A member's logits when one machine runs it from the input, nothing quantised on the way."""
    member = family.member(name, backend=backend, threads=threads)
    return np.concatenate([member.run(batch).logits for batch in batches])


def top1(logits: Array, labels: Labels) -> float:
    """Share of right answers."""
    return float((logits.argmax(1) == labels).mean())


def median_s(call: Callable[[], Any]) -> float:
    """Median time of one call, warmed up, over half a second or five calls."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < WARM_S + TIMED_S:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        if end - begin > WARM_S:
            times.append(end - start)
    return float(np.median(times))
