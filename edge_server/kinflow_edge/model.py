"""What a server serves of one family: a member opened at every split it can continue from, with the codecs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from kinflow import policy
from kinflow.errors import FamilyMismatch
from kinflow.family import INPUT, Family, Member
from kinflow.manifest import Exit
from kinflow.messages import Request, Served
from kinflow.policy import Rate
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
    rates: tuple[Rate, ...]
    """The codecs at `next_split`, the default first, then the ever smaller ones."""

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
        rates = () if next_split is None else policy.rates(family.manifest.splits[next_split])
        return cls(family, entries, family.manifest.exits[str(last.exit)], next_split, forwards, rates)

    def warm_up(self) -> float:
        """Run every entry twice on zeros; the seconds that one item took last. The first run allocates."""
        spent_s = 0.0
        for entry in self.entries.values():
            for _ in range(2):
                start = time.perf_counter()
                entry.member.run(np.zeros((1, *entry.shape), np.float32))
                spent_s = time.perf_counter() - start
        return spent_s

    def test_request(self) -> tuple[Request, bytes]:
        """A request of zeros at the first split, and its payload; id, client and deadline are filled in later."""
        entry = next(iter(self.entries.values()))
        codec = self.family.codec(entry.split)
        request = Request(bytes(16), "x", self.family.id, self.family.version, entry.split, codec.name, 0.0)
        return request, codec.encode(np.zeros(entry.shape, np.float32))

    def served(self) -> Served:
        """What the retained status says."""
        splits = {split: list(entry.codecs) for split, entry in self.entries.items()}
        return Served(self.family.id, self.family.version, splits)

    def leads_up(self, split: str) -> bool:
        """Whether a request that came in at `split` can go further up from here."""
        return not self.forwards or split == self.next_split

    def rates_up(self, codec: str, payload_bytes: int) -> tuple[Rate, ...]:
        """How features may go further up: coded as they came, where that is what is sent; else the split's own ways."""
        if self.forwards:
            return (Rate(codec, payload_bytes),)
        return self.rates

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
