"""What a server serves of one family: a member opened at every split it can continue from, with the codecs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from kinflow.errors import FamilyMismatch
from kinflow.family import INPUT, Family, Member
from kinflow.manifest import Exit
from kinflow.messages import Request, Served
from kinflow.tokens import FeatureCodec


@dataclass(frozen=True)
class Entry:
    """One way in: the member from `split` on."""

    split: str
    member: Member
    codecs: dict[str, FeatureCodec]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ServedFamily:
    """A family as this server runs it."""

    family: Family
    entries: dict[str, Entry]
    exit: Exit
    next_split: str | None
    """Where features may go further up: the split at which the member ends or, where a larger member continues
    from the one it began at, that one; None at the largest member."""
    forwards: bool
    """What goes further up is what came, still coded: the member has no features of its own to send."""

    @classmethod
    def open(cls, family: Family, member: str, threads: int) -> ServedFamily:
        """Raises FamilyMismatch when no split leads into the member, BackendError when it does not run."""
        spec = family.manifest.members.get(member)
        if spec is None:
            raise FamilyMismatch(f"{family.id} has the members {sorted(family.manifest.members)}, not {member!r}")
        segments = [family.manifest.segments[name] for name in spec.segments]
        splits = [segment.source for segment in segments if segment.source != INPUT]
        if not splits:
            raise FamilyMismatch(f"member {member!r} of {family.id} begins at the input: no server can continue it")
        entries = {}
        for split in splits:
            codecs = {name: family.codec(split, name) for name in family.manifest.splits[split].codecs}
            shape = tuple(family.manifest.splits[split].shape)
            entries[split] = Entry(split, family.member(member, source=split, threads=threads), codecs, shape)
        last = segments[-1]
        forwards = last.split is None and last.source in family.sources_above(member)
        next_split = last.source if forwards else last.split
        return cls(family, entries, family.manifest.exits[str(last.exit)], next_split, forwards)

    def warm_up(self) -> float:
        """Run every entry twice on zeros; the seconds that one item took last. The first run allocates."""
        spent_s = 0.0
        for entry in self.entries.values():
            for _ in range(2):
                start = time.perf_counter()
                entry.member.run(np.zeros((1, *entry.shape), np.float32))
                spent_s = time.perf_counter() - start
        return spent_s

    def served(self) -> Served:
        """What the retained status says."""
        splits = {split: list(entry.codecs) for split, entry in self.entries.items()}
        return Served(self.family.id, self.family.version, splits)

    def entry(self, request: Request) -> tuple[Entry, FeatureCodec]:
        """Raises FamilyMismatch that names what differs."""
        if request.version != self.family.version:
            raise FamilyMismatch(
                f"{self.family.id} {self.family.version} is served here, the request is for {request.version}"
            )
        entry = self.entries.get(request.split)
        if entry is None:
            raise FamilyMismatch(f"split {request.split!r} is not served here, {sorted(self.entries)} are")
        codec = entry.codecs.get(request.codec)
        if codec is None:
            raise FamilyMismatch(
                f"codec {request.codec!r} is unknown at {request.split}, {sorted(entry.codecs)} are known"
            )
        return entry, codec
