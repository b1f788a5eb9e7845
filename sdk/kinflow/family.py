"""Reads and verifies a bundle: Family holds what `family.json` says, Member runs one size of it.

Everything is checked before the first graph is opened: the manifest's types, its references, every file's
size and sha256. Graphs are opened from the verified bytes, so a file cannot change in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow import backends
from kinflow.bundle import MANIFEST, MAX_MANIFEST_BYTES, decode_manifest, open_reader, read_verified
from kinflow.codec import UniformCodec
from kinflow.errors import BundleError, CodecError, FamilyMismatch
from kinflow.manifest import MAX_FEATURES, BackendName, Manifest, Preprocess
from kinflow.signing import MAX_SIGNATURE_BYTES, NO_KEYS, SIGNATURE, TrustedKeys
from kinflow.tokens import FeatureCodec, TokenMergeCodec

INPUT = "input"
TASK = "image-classification"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """A verified bundle. `Family.load` is the way to make one."""

    path: Path
    manifest: Manifest
    files: dict[str, bytes]
    """Verified contents by path."""
    codecs: dict[tuple[str, str], FeatureCodec]
    """By split and name."""
    signed_by: str
    """The trusted key that signed it; empty where none was asked for."""
    raw_manifest: bytes
    signatures: bytes
    """family.json and family.sig as they are: what a device that pulls the bundle gets."""

    @classmethod
    def load(
        cls, path: str | Path, *, trusted: TrustedKeys = NO_KEYS, member: str = "", backend: BackendName = "onnx"
    ) -> Family:
        """From a folder or a .zip. Raises BundleError that names the field or file and what was expected.

        With `trusted` keys one of them must have signed the manifest. With `member`, files that this member does
        not need on `backend` may be missing: a device that pulled its bundle has no others.
        """
        root = Path(path)
        reader = open_reader(root)
        try:
            raw = reader.read(MANIFEST, MAX_MANIFEST_BYTES)
            signatures = reader.read(SIGNATURE, MAX_SIGNATURE_BYTES) if reader.has(SIGNATURE) else b""
            manifest, signed_by = read_manifest(raw, signatures, trusted, str(root))
            needed = manifest.files_of(member, backend) if member in manifest.members else manifest.files()
            files = {file.path: read_verified(reader, root, file) for file in needed}
            for file in manifest.files():
                if file.path not in files and reader.has(file.path):
                    files[file.path] = read_verified(reader, root, file)
        finally:
            reader.close()
        return cls(root, manifest, files, _open_codecs(root, manifest, files), signed_by, raw, signatures)

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def labels(self) -> list[str]:
        return self.manifest.labels

    @property
    def preprocess(self) -> Preprocess:
        return self.manifest.preprocess

    def codec(self, split: str, name: str = "") -> FeatureCodec:
        """The codec called `name` at `split`, the split's default one without a name. Raises FamilyMismatch."""
        spec = self.manifest.splits.get(split)
        if spec is None:
            raise FamilyMismatch(f"{self.id} has the splits {_names(self.manifest.splits)}, asked for {split!r}")
        codec = self.codecs.get((split, name or spec.default_codec))
        if codec is None:
            raise FamilyMismatch(f"split {split!r} of {self.id} has the codecs {_names(spec.codecs)}, got {name!r}")
        return codec

    def member(
        self,
        name: str,
        *,
        backend: BackendName = "onnx",
        source: str = INPUT,
        threads: int = 1,
        acceleration: backends.Acceleration = backends.ON_CPU,
    ) -> Member:
        """Open the part of a member that begins at `source` (the input or a split).

        Raises FamilyMismatch for an unknown member or source, BackendError when the runtime is not there.
        """
        spec = self.manifest.members.get(name)
        if spec is None:
            raise FamilyMismatch(f"{self.id} has the members {_names(self.manifest.members)}, asked for {name!r}")
        sources = [self.manifest.segments[segment].source for segment in spec.segments]
        if source not in sources:
            raise FamilyMismatch(f"member {name!r} of {self.id} can begin at {_names(sources)}, asked for {source!r}")
        opened = []
        for segment in spec.segments[sources.index(source) :]:
            opened.append(self._open_segment(segment, backend, threads, acceleration))
        return Member(name, source, tuple(opened))

    def sources_above(self, member: str) -> set[str]:
        """Where the segments of the larger members begin. The manifest lists members smallest first."""
        names = list(self.manifest.members)
        larger = [self.manifest.members[name] for name in names[names.index(member) + 1 :]]
        return {self.manifest.segments[segment].source for spec in larger for segment in spec.segments}

    def _open_segment(
        self, name: str, backend: BackendName, threads: int, acceleration: backends.Acceleration
    ) -> Segment:
        spec = self.manifest.segments[name]
        graph = spec.graphs.get(backend)
        if graph is None:
            raise FamilyMismatch(
                f"segment {name!r} of {self.id} has graphs for {_names(spec.graphs)}, asked for {backend!r}"
            )
        if graph.file.path not in self.files:
            raise BundleError(
                f"{self.path}: the file of segment {name!r} is not there: this bundle was pulled for another member"
            )
        return Segment(
            name,
            spec.split,
            spec.exit,
            backends.open_graph(backend, self.files[graph.file.path], graph, threads, acceleration),
        )


def read_manifest(raw: bytes, signatures: bytes, trusted: TrustedKeys, name: str) -> tuple[Manifest, str]:
    """The checked manifest and the trusted key that signed it, if any are asked for. Raises BundleError."""
    manifest, signed_by = decode_manifest(raw, signatures, trusted, name, Manifest, TASK)
    _check_references(name, manifest)
    return manifest, signed_by


class Output(NamedTuple):
    """What a member computed for a batch. Arrays are float32 with the batch axis first."""

    features: Array | None
    """Features at `split`; None when the member ends with its exit."""
    split: str | None
    logits: Array
    """[batch, classes]"""
    exit: str


@dataclass(frozen=True)
class Segment:
    """One opened graph."""

    name: str
    split: str | None
    exit: str | None
    runner: backends.Runner


@dataclass(frozen=True)
class Member:
    """One size of the family, opened from `source` on."""

    name: str
    source: str
    segments: tuple[Segment, ...]

    def run(self, batch: Array) -> Output:
        """`batch`: the input, or features at `source`: float32 [n, …]. Raises BackendError."""
        return self.finish(batch, self.source)

    @property
    def early_splits(self) -> tuple[str, ...]:
        """Splits that it passes on the way to its end, the first one first."""
        return tuple(str(segment.split) for segment in self.segments[:-1])

    def start(self, batch: Array, split: str) -> Array:
        """Features at one of `early_splits`; nothing behind it is computed. `batch` as for `run`."""
        features = batch
        for segment in self.segments[: self.early_splits.index(split) + 1]:
            features = segment.runner.run(features)[0]
        return features

    def finish(self, features: Array, split: str) -> Output:
        """What `run` gives, from features at `split` on: one of `early_splits`, or `source`."""
        first = 0 if split == self.source else self.early_splits.index(split) + 1
        reached: Array | None = features
        logits: Array | None = None
        for segment in self.segments[first:]:
            assert reached is not None  # _check_references: only the last segment may end without a split
            outputs = segment.runner.run(reached)
            reached = outputs[0] if segment.split is not None else None
            logits = outputs[-1] if segment.exit is not None else None
        last = self.segments[-1]
        assert logits is not None  # _check_references: a member ends at an exit
        assert last.exit is not None
        return Output(reached, last.split, logits, last.exit)


def _open_codecs(root: Path, manifest: Manifest, files: dict[str, bytes]) -> dict[tuple[str, str], FeatureCodec]:
    codecs: dict[tuple[str, str], FeatureCodec] = {}
    for split, spec in manifest.splits.items():
        channels, height, width = spec.shape
        for name, codec in spec.codecs.items():
            if codec.table is not None and codec.table.path not in files:
                continue  # of a split that this member does not use
            try:
                made: type[FeatureCodec] = TokenMergeCodec if codec.kind == "token-merge" else UniformCodec
                codecs[split, name] = made.from_spec(
                    name, (channels, height, width), codec, files[codec.table.path] if codec.table else None
                )
            except CodecError as exc:
                raise BundleError(f"{root}: {exc}") from exc
    return codecs


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _check_references(root: str, manifest: Manifest) -> None:
    """Names that point nowhere, members that do not chain, shapes that do not meet."""

    def fail(what: str) -> None:
        raise BundleError(f"{root}/{MANIFEST}: {what}")

    channels = {"L": 1, "RGB": 3}[manifest.preprocess.mode]
    if len(manifest.preprocess.mean) != channels or len(manifest.preprocess.std) != channels:
        fail(f"preprocess.mean and preprocess.std need {channels} entries for mode {manifest.preprocess.mode}")
    shapes = {INPUT: [channels, manifest.preprocess.height, manifest.preprocess.width]}
    if INPUT in manifest.splits:
        fail(f"a split may not be called {INPUT!r}: segments mean the family's input by it")
    for name, split in manifest.splits.items():
        shapes[name] = split.shape
        if math.prod(split.shape) > MAX_FEATURES:
            fail(f"splits.{name}.shape is {split.shape}, more than {MAX_FEATURES} values")
        if split.default_codec not in split.codecs:
            fail(f"splits.{name}.default_codec is {split.default_codec!r}, the codecs are {_names(split.codecs)}")
    for name, segment in manifest.segments.items():
        where = f"segments.{name}"
        if segment.source not in shapes:
            fail(f"{where}.source is {segment.source!r}, known are {_names(shapes)}")
        if segment.split is not None and segment.split not in manifest.splits:
            fail(f"{where}.split is {segment.split!r}, the splits are {_names(manifest.splits)}")
        if segment.exit is not None and segment.exit not in manifest.exits:
            fail(f"{where}.exit is {segment.exit!r}, the exits are {_names(manifest.exits)}")
        expected = [shapes[segment.split]] if segment.split is not None else []
        expected += [[len(manifest.labels)]] if segment.exit is not None else []
        for backend, graph in segment.graphs.items():
            if graph.input.shape != shapes[segment.source]:
                fail(f"{where}.graphs.{backend} takes {graph.input.shape}, its source has {shapes[segment.source]}")
            if [output.shape for output in graph.outputs] != expected:
                found = [output.shape for output in graph.outputs]
                fail(f"{where}.graphs.{backend} gives {found}, its split and exit need {expected}")
    for name, member in manifest.members.items():
        source: str | None = INPUT
        for position, segment_name in enumerate(member.segments):
            where = f"members.{name}.segments[{position}]"
            if segment_name not in manifest.segments:
                fail(f"{where} is {segment_name!r}, the segments are {_names(manifest.segments)}")
            if manifest.segments[segment_name].source != source:
                fail(f"{where} begins at {manifest.segments[segment_name].source!r}, expected {source!r}")
            source = manifest.segments[segment_name].split
        if manifest.segments[member.segments[-1]].exit is None:
            fail(f"members.{name} must end with a segment that has an exit")
