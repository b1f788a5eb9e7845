"""What a server serves of a language model: a member's segments opened, and the ways that lead through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow.errors import FamilyMismatch, InputError
from kinflow.frame import Buffer
from kinflow.messages import MAX_DRAFTS, Served, Verify
from kinflow.text.cache import Cache
from kinflow.text.codec import FeatureCodec
from kinflow.text.family import TextFamily
from kinflow.text.head import HeadRunner
from kinflow.text.manifest import HEAD, IDS, LOWER
from kinflow.text.segment import SegmentRunner

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# A token's id on the wire.
ID_BYTES = 4


class Way(NamedTuple):
    """How a request is computed here."""

    path: tuple[str, ...]
    """This server's segments, from where the features came in."""
    exit: str
    """Whose normed features come out of them; empty: the way ends at `split`, and the tier above goes on."""
    split: str


@dataclass(frozen=True)
class ServedText:
    """A family as this server runs it."""

    family: TextFamily
    member: str
    segments: dict[str, SegmentRunner]
    """In the order of computation."""
    head: HeadRunner
    exit: str
    """The member's own exit: what it says where nothing above answers."""
    sources: tuple[str, ...]
    """Where requests may come in: splits, and `ids` where all layers of the exit are here."""

    @classmethod
    def open(cls, family: TextFamily, member: str, threads: int) -> ServedText:
        """Raises FamilyMismatch when the member leads to no exit, BundleError and BackendError when it does not run."""
        manifest = family.manifest
        spec = manifest.members.get(member)
        if spec is None:
            raise FamilyMismatch(f"{family.id} has the members {sorted(manifest.members)}, not {member!r}")
        own = [name for name in spec.segments if name != HEAD]
        if not own or LOWER in own:
            raise FamilyMismatch(f"member {member!r} of {family.id} begins at the token ids: no server can continue it")
        exit_name = manifest.segments[own[-1]].result
        if exit_name not in manifest.exits or set(own) - set(manifest.exits[exit_name].segments):
            raise FamilyMismatch(f"member {member!r} of {family.id}: {own} do not lead to one exit")
        path = manifest.exits[exit_name].segments
        # The largest member may be asked for all of its layers: by clients on narrow links, and to redo what is close.
        needed = path if exit_name == manifest.last_exit() else path[path.index(own[0]) :]
        opened = {name: family.batched(name, threads=threads) for name in needed}
        sources = tuple(manifest.segments[name].source for name in needed)
        return cls(family, member, opened, family.head(threads=threads), exit_name, sources)

    @property
    def next_split(self) -> str | None:
        """Where features go further up: the last split that a larger member goes on from; None at the largest."""
        rest = self._rest(self.family.manifest.last_exit(), self.sources[0])
        return self.family.manifest.segments[rest[0]].source if rest else None

    def served(self) -> Served:
        """What the retained status says."""
        splits = self.family.manifest.splits
        return Served(
            self.family.id,
            self.family.version,
            {source: [IDS] if source == IDS else list(splits[source].codecs) for source in self.sources},
        )

    def way(self, source: str, exit_name: str) -> Way:
        """From `source` towards an exit, as far as this server can compute. Raises FamilyMismatch."""
        exits = list(self.family.manifest.exits)
        if exit_name not in exits:
            raise FamilyMismatch(f"{self.family.id} has the exits {exits}, the request is for {exit_name!r}")
        if source not in self.sources:
            raise FamilyMismatch(f"split {source!r} is not served here, {sorted(self.sources)} are")
        whole = self._from(exit_name, source)
        rest = self._rest(exit_name, source)
        # What this server does not have is only asked for where it is above.
        if not whole or (rest and exits.index(exit_name) < exits.index(self.exit)):
            raise FamilyMismatch(f"exit {exit_name!r} cannot be reached from {source!r} here")
        if not rest:
            return Way(tuple(whole), exit_name, "")
        split = self.family.manifest.segments[rest[0]].source
        return Way(tuple(whole[: len(whole) - len(rest)]), "", split)

    def own_way(self, split: str) -> tuple[str, ...]:
        """The segments from `split` to this member's own exit."""
        return tuple(self._from(self.exit, split))

    def warm_up(self) -> None:
        """Run every segment on a few positions. The first run allocates."""
        caches, width = self.caches(), self.family.manifest.width
        for name, segment in self.segments.items():
            dtype: type = np.int64 if name == LOWER else np.float32
            segment.run(np.zeros((1, 2) if name == LOWER else (1, 2, width), dtype), [caches[name]])
        self.head.run(np.zeros((2, width), np.float32))

    def test_request(self) -> tuple[Verify, bytes]:
        """A real verification of one draft, in a session of its own; id and client are filled in later."""
        split = self.sources[0]
        codec = IDS if split == IDS else next(iter(self.family.manifest.splits[split].codecs))
        payload = np.zeros(2, "<u4").tobytes()
        if split != IDS:
            payload += self.family.codec(split, codec).encode(np.zeros((2, self.family.manifest.width), np.float32))
        verify = Verify(
            id=bytes(16),
            client="x",
            family=self.family.id,
            version=self.family.version,
            split=split,
            codec=codec,
            session=bytes(16),
            start=0,
            confirmed=1,
            count=2,
            exit=self.exit,
            exact=False,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            deadline_ms=0.0,
        )
        return verify, payload

    def caches(self) -> dict[str, Cache]:
        """Empty ones, for every segment."""
        return {name: segment.past() for name, segment in self.segments.items()}

    def layers(self, path: tuple[str, ...]) -> int:
        return sum(self.family.manifest.segments[name].layers for name in path)

    @property
    def position_bytes(self) -> int:
        """What one position of a session takes in all caches."""
        manifest = self.family.manifest
        return self.layers(tuple(self.segments)) * 2 * manifest.kv_heads * manifest.head_size * 4

    def read(self, verify: Verify, payload: Buffer) -> tuple[Ids, Array | None]:
        """Token ids and features of a request. Raises FamilyMismatch, InputError, CodecError."""
        if verify.version != self.family.version:
            served = f"{self.family.id} {self.family.version}"
            raise FamilyMismatch(f"{served} is served here, the request is for {verify.version}")
        codec = self._codec(verify)
        self._check(verify)
        cut = verify.count * ID_BYTES
        if len(payload) < cut:
            raise InputError(f"{verify.count} tokens are {cut} bytes, the payload has {len(payload)}")
        tokens = np.frombuffer(payload[:cut], "<u4").astype(np.int64)
        if tokens.max() >= self.family.manifest.vocabulary:
            raise InputError(f"token {tokens.max()} is none of the {self.family.manifest.vocabulary}")
        if codec is not None:
            return tokens, codec.decode(payload[cut:], verify.count)
        if len(payload) > cut:
            raise InputError(f"{verify.count} tokens alone are {cut} bytes, the payload has {len(payload)}")
        return tokens, None

    def _codec(self, verify: Verify) -> FeatureCodec | None:
        if (verify.split == IDS) != (verify.codec == IDS):
            raise FamilyMismatch(f"codec {verify.codec!r} is unknown at {verify.split!r}")
        codec = None if verify.split == IDS else self.family.codec(verify.split, verify.codec)
        if verify.exact and codec is not None:
            spec = self.family.manifest.splits[verify.split].codecs[verify.codec]
            if spec.kind != "token-f16":
                raise InputError(f"exact: the bound on errors is that of float16, codec {verify.codec!r} is another")
        return codec

    def _check(self, verify: Verify) -> None:
        end = verify.start + verify.count
        if not verify.start <= verify.confirmed <= end:
            raise InputError(f"confirmed is {verify.confirmed}, the positions sent are {verify.start} to {end - 1}")
        if end > self.family.manifest.context:
            raise InputError(f"position {end - 1} is beyond the context of {self.family.manifest.context}")
        if end - verify.confirmed > MAX_DRAFTS:
            raise InputError(f"{end - verify.confirmed} drafts, at most {MAX_DRAFTS} are verified at once")

    def _from(self, exit_name: str, source: str) -> list[str]:
        """The segments from `source` to an exit; empty where it is not on the way there."""
        path = self.family.manifest.exits[exit_name].segments
        sources = [self.family.manifest.segments[name].source for name in path]
        return path[sources.index(source) :] if source in sources else []

    def _rest(self, exit_name: str, source: str) -> list[str]:
        """Of them, those from the first one on that this server does not have."""
        path = self._from(exit_name, source)
        missing = [at for at, name in enumerate(path) if name not in self.segments]
        return path[missing[0] :] if missing else []
