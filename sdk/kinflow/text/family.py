"""Reads and verifies a language model's bundle, and runs its segments.

The manifest is checked when the bundle is opened, a segment's file when the segment is: graphs are large, and a
device needs few of them. Graphs are opened from the verified bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kinflow.bundle import MANIFEST, MAX_MANIFEST_BYTES, decode_manifest, open_reader, read_verified
from kinflow.errors import BundleError, CodecError, FamilyMismatch
from kinflow.manifest import File
from kinflow.signing import MAX_SIGNATURE_BYTES, NO_KEYS, SIGNATURE, TrustedKeys
from kinflow.text.codec import FeatureCodec, open_codecs
from kinflow.text.fused import FusedRunner
from kinflow.text.head import HeadRunner
from kinflow.text.manifest import HEAD, IDS, TASK, Precision, TextManifest
from kinflow.text.segment import SegmentRunner, Session, TextSegment
from kinflow.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextFamily:
    """A bundle whose manifest is verified. `TextFamily.load` is the way to make one."""

    path: Path
    manifest: TextManifest
    codecs: dict[tuple[str, str], FeatureCodec]
    """By split and name."""
    signed_by: str
    """The trusted key that signed it; empty where none was asked for."""
    raw_manifest: bytes
    signatures: bytes

    @classmethod
    def load(cls, path: str | Path, *, trusted: TrustedKeys = NO_KEYS) -> TextFamily:
        """From a folder or a .zip. Raises BundleError that names the field or file and what was expected."""
        root = Path(path)
        reader = open_reader(root)
        try:
            raw = reader.read(MANIFEST, MAX_MANIFEST_BYTES)
            signatures = reader.read(SIGNATURE, MAX_SIGNATURE_BYTES) if reader.has(SIGNATURE) else b""
        finally:
            reader.close()
        manifest, signed_by = read_text_manifest(raw, signatures, trusted, str(root))
        codecs = _open_codecs(root, manifest)
        return cls(root, manifest, codecs, signed_by, raw, signatures)

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def version(self) -> str:
        return self.manifest.version

    def codec(self, split: str, name: str) -> FeatureCodec:
        """Raises FamilyMismatch."""
        codec = self.codecs.get((split, name))
        if codec is None:
            known = ", ".join(f"{name!r} at {split!r}" for split, name in self.codecs)
            raise FamilyMismatch(f"{self.id} has the codecs {known}, got {name!r} at {split!r}")
        return codec

    def read(self, file: File) -> bytes:
        """Its verified bytes. Raises BundleError."""
        reader = open_reader(self.path)
        try:
            return read_verified(reader, self.path, file)
        finally:
            reader.close()

    def verify(self) -> list[File]:
        """Every file of the manifest, each read and compared with its hash. Raises BundleError."""
        files = list({file.path: file for file in self.manifest.files()}.values())
        reader = open_reader(self.path)
        try:
            for file in files:
                read_verified(reader, self.path, file)
        finally:
            reader.close()
        return files

    def tokenizer(self) -> Tokenizer:
        """Raises BundleError, also where the extra is not installed."""
        manifest = self.manifest
        return Tokenizer(self.read(manifest.tokenizer), self.read(manifest.chat_template), manifest.stop_tokens)

    def segment(self, name: str, precision: Precision = "float", *, threads: int = 1) -> TextSegment:
        """At `precision`, or at the only one that there is. Raises FamilyMismatch, BundleError, BackendError."""
        session = Session(*self._graph(name, precision), threads)
        kind = FusedRunner if session.fused else SegmentRunner
        return kind(name, session, self.manifest)

    def batched(self, name: str, *, threads: int = 1) -> SegmentRunner:
        """A segment for sessions of many clients at once, in floats. Raises as `segment` does."""
        runner = self.segment(name, threads=threads)
        if not isinstance(runner, SegmentRunner):
            raise FamilyMismatch(f"{self.id}: segment {name!r} has no graph for several texts at once")
        return runner

    def head(self, precision: Precision = "float", *, threads: int = 1) -> HeadRunner:
        """The LM head. Raises as `segment` does."""
        return HeadRunner(HEAD, *self._graph(HEAD, precision), threads)

    def _graph(self, name: str, precision: Precision) -> tuple[bytes, str]:
        spec = self.manifest.segments.get(name)
        if spec is None:
            raise FamilyMismatch(f"{self.id} has the segments {_names(self.manifest.segments)}, asked for {name!r}")
        graph = spec.graphs.get(precision) or next(iter(spec.graphs.values()))
        return self.read(graph.file), graph.file.path


def read_text_manifest(raw: bytes, signatures: bytes, trusted: TrustedKeys, name: str) -> tuple[TextManifest, str]:
    """The checked manifest and the trusted key that signed it, if any are asked for. Raises BundleError."""
    manifest, signed_by = decode_manifest(raw, signatures, trusted, name, TextManifest, TASK)
    _check_references(name, manifest)
    return manifest, signed_by


def _check_references(root: str, manifest: TextManifest) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise BundleError(f"{root}/{MANIFEST}: {what}")

    segments = manifest.segments
    ends = {IDS, *manifest.splits}
    require(HEAD in segments and segments[HEAD].kind == "head", f"there must be a segment {HEAD!r} of kind head")
    require(manifest.heads % manifest.kv_heads == 0, "heads must be a multiple of kv_heads")
    for name, segment in segments.items():
        if name == HEAD:
            require(segment.layers == 0, f"segment {HEAD!r} has no layers of its own")
            continue
        require(segment.kind != "head", f"segment {name!r}: the one head is called {HEAD!r}")
        require(segment.layers > 0, f"segment {name!r} has no layers")
        require(segment.source in ends, f"segment {name!r} begins at {segment.source!r}, which is no split")
        known = manifest.splits if segment.kind == "trunk" and segment.result in manifest.splits else manifest.exits
        require(segment.result in known, f"segment {name!r} ends at {segment.result!r}, which is no split or exit")
    for name, spec in manifest.exits.items():
        _check_path(spec.segments, name, manifest, f"exit {name!r}", require)
    for name, member in manifest.members.items():
        unknown = [segment for segment in member.segments if segment not in segments]
        require(not unknown, f"member {name!r} has unknown segments {_names(unknown)}")
    require(
        all(0 <= token < manifest.vocabulary for token in manifest.stop_tokens), "stop_tokens are not in the vocabulary"
    )


def _check_path(
    path: Sequence[str], end: str, manifest: TextManifest, what: str, require: Callable[[bool, str], None]
) -> None:
    """`path` leads from the ids to `end`, each segment where the last one ended."""
    at = IDS
    for name in path:
        require(name in manifest.segments, f"{what} has the unknown segment {name!r}")
        segment = manifest.segments[name]
        require(segment.source == at, f"{what}: segment {name!r} begins at {segment.source!r}, after {at!r}")
        at = segment.result
    require(at == end, f"{what}: its segments end at {at!r}")


def _open_codecs(root: Path, manifest: TextManifest) -> dict[tuple[str, str], FeatureCodec]:
    try:
        return {
            (split, name): codec
            for split, spec in manifest.splits.items()
            for name, codec in open_codecs(spec, manifest.width).items()
        }
    except CodecError as exc:
        raise BundleError(f"{root}/{MANIFEST}: {exc}") from exc


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
