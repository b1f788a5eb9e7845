"""What is fuzzed: each target takes any bytes. Only the errors that it names may leave a parser.

What a parser accepts is written again and read again: it must mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from text_manifest import TEXT_MANIFEST

from kinflow import frame, packet
from kinflow.address import BrokerAddress
from kinflow.advert import read_advert
from kinflow.codec import UniformCodec, pack_table, table_from_counts
from kinflow.errors import (
    BundleError,
    CodecError,
    DiscoveryError,
    FamilyMismatch,
    FrameError,
    InputError,
    SettingsError,
)
from kinflow.family import read_manifest
from kinflow.identity import Identity
from kinflow.manifest import Codec, Merge
from kinflow.messages import Verify
from kinflow.signing import NO_KEYS, TrustedKeys
from kinflow.text.codec import open_codecs
from kinflow.text.family import TextFamily, read_text_manifest
from kinflow.tokens import FeatureCodec, TokenMergeCodec
from kinflow_edge.text.model import ServedText

SHAPE = (2, 3, 5)
COUNTS = np.random.default_rng(4).integers(0, 50, (SHAPE[0], 256)) ** 3
TABLE = pack_table(table_from_counts(COUNTS))
MERGE = Merge(clusters=6, neighbours=2)


def _spec(kind: str, bits: int, merge: Merge | None = None) -> Codec:
    step, zero = [0.5, 2.0], [8, 3]
    return Codec(kind=kind, bits=bits, step=step, zero=zero, table=None, bytes_mean=1.0, merge=merge)  # type: ignore[arg-type]


CODECS = [
    UniformCodec.from_spec("fuzzed", SHAPE, _spec("uniform-rans", 4), TABLE),
    UniformCodec.from_spec("fuzzed", SHAPE, _spec("uniform-rans", 8), TABLE),
    UniformCodec.from_spec("fuzzed", SHAPE, _spec("uniform", 4), None),
    UniformCodec.from_spec("fuzzed", SHAPE, _spec("uniform", 8), None),
]
MERGING = [TokenMergeCodec.from_spec("fuzzed", SHAPE, _spec("token-merge", bits, MERGE), TABLE) for bits in (4, 8)]


def _served_text() -> ServedText:
    """A server's view of the manifest; no graph is opened, nothing is computed."""
    manifest, _ = read_text_manifest(TEXT_MANIFEST, b"", NO_KEYS, "fuzzed")
    codecs = {
        (split, name): codec
        for split, spec in manifest.splits.items()
        for name, codec in open_codecs(spec, manifest.width).items()
    }
    family = TextFamily(Path("fuzzed"), manifest, codecs, "", TEXT_MANIFEST, b"")
    return ServedText(family, "edge", {}, None, "edge", ("ids", "s1"))  # type: ignore[arg-type]


TEXT = _served_text()


def frames(data: bytes) -> None:
    """A whole MQTT payload."""
    with suppress(FrameError):
        message, payload = frame.unpack(data)
        assert frame.unpack(frame.pack(message, payload)) == (message, payload)


def messages(data: bytes) -> None:
    """A header in a frame that is otherwise valid: a mutated frame would nearly always fail at its checksum."""
    if len(data) <= frame.MAX_HEADER_BYTES:
        frames(_framed(data))


def _framed(header: bytes, payload: bytes = b"") -> bytes:
    body = frame._PREFIX.pack(frame.MAGIC, frame.VERSION, len(header), len(payload)) + header + payload
    return body + frame._CRC.pack(frame.zlib.crc32(body))


def packets(data: bytes) -> None:
    """A PUBLISH as it comes from the socket."""
    with suppress(FrameError):
        packet.packet_bytes(data[: packet.MAX_FIXED_HEADER_BYTES])
    with suppress(FrameError):
        topic, payload = packet.split_publish(data)
        again = packet.publish_header(topic.encode(), len(payload), retain=False) + payload
        assert packet.split_publish(again) == (topic, payload)


def codecs(data: bytes) -> None:
    """Coded features; the first byte chooses the codec."""
    _decoded(CODECS, data)


def merged(data: bytes) -> None:
    """The same for merged tokens."""
    _decoded(MERGING, data)


def _decoded(among: Sequence[FeatureCodec], data: bytes) -> None:
    codec, coded = among[data[0] % len(among) if data else 0], data[1:]
    with suppress(CodecError):
        features = codec.decode(coded)
        assert features.shape == SHAPE
        assert np.isfinite(features).all()
        assert np.array_equal(codec.decode(codec.encode(features)), features)


def tables(data: bytes) -> None:
    """A codec's table, as it stands in a bundle."""
    with suppress(CodecError):
        codec = UniformCodec.from_spec("fuzzed", SHAPE, _spec("uniform-rans", 8), data)
        levels = codec.decode(codec.encode(np.zeros(SHAPE, np.float32)))
        assert not levels.any()


def tokens(data: bytes) -> None:
    """Coded features of tokens; the first byte chooses the codec, the second says how many."""
    codecs = TEXT.family.codecs
    codec, count = list(codecs.values())[data[0] % len(codecs) if data else 0], data[1] if len(data) > 1 else 0
    with suppress(CodecError):
        features = codec.decode(data[2:], count)
        assert features.shape == (count, TEXT.family.manifest.width)
        assert np.isfinite(features).all()
        again = codec.decode(codec.encode(features), count)
        assert np.isfinite(again).all()


def verifications(data: bytes) -> None:
    """A frame with a step of a generation: what a server reads of it before anything is computed."""
    with suppress(FrameError, FamilyMismatch, InputError, CodecError):
        message, payload = frame.unpack(data)
        if isinstance(message, Verify):
            TEXT.way(message.split, message.exit)
            ids, features = TEXT.read(message, payload)
            assert len(ids) == message.count < TEXT.family.manifest.context
            assert ids.min() >= 0
            assert ids.max() < TEXT.family.manifest.vocabulary
            assert features is None or np.isfinite(features).all()


def steps(data: bytes) -> None:
    """The same in a valid frame, as `messages`: the first two bytes are the header's length."""
    header = data[2 : 2 + int.from_bytes(data[:2], "little")]
    if len(header) <= frame.MAX_HEADER_BYTES:
        verifications(_framed(header, data[2 + len(header) :]))


def manifests(data: bytes) -> None:
    """A family.json."""
    with suppress(BundleError, CodecError):
        manifest, _ = read_manifest(data, b"", NO_KEYS, "fuzzed")
        manifest.files()
        for split in manifest.splits.values():
            for spec in split.codecs.values():
                plain = msgspec.structs.replace(spec, kind="uniform", merge=None)
                codec = UniformCodec.from_spec("fuzzed", (split.shape[0], 1, 1), plain, None)
                assert np.isfinite(codec.dequantise(np.full(codec.shape, 255, np.uint8))).all()


def text_manifests(data: bytes) -> None:
    """A family.json of a language model, and its codecs."""
    with suppress(BundleError, CodecError):
        manifest, _ = read_text_manifest(data, b"", NO_KEYS, "fuzzed")
        list(manifest.files())
        for split in manifest.splits.values():
            for codec in open_codecs(split, manifest.width).values():
                largest = codec.decode((b"\xff\x7b" + bytes([127]) * (2 * manifest.width))[: codec.token_bytes], 1)
                assert np.isfinite(largest).all()


def signatures(data: bytes) -> None:
    """A family.sig, and a key from the settings."""
    trusted = TrustedKeys(frozenset({bytes(32)}))
    with suppress(BundleError):
        trusted.check(b"{}", data, "fuzzed")
    with suppress(SettingsError):
        TrustedKeys.parse(data.decode(errors="replace").splitlines())


def adverts(data: bytes) -> None:
    """A TXT record, its keys and values cut at zero bytes."""
    parts = data.split(b"\0")
    txt = dict(zip((b"node", b"tier", b"families", b"software", b"other"), parts, strict=False))
    with suppress(DiscoveryError):
        node = read_advert(txt, "192.0.2.1", 1883)
        assert len(node.node) <= 64


def names(data: bytes) -> None:
    """What a settings file or a certificate may call a broker or a holder."""
    text = data.decode(errors="replace")
    with suppress(SettingsError):
        address = BrokerAddress.parse(text)
        assert BrokerAddress.parse(str(address)) == address
    with suppress(SettingsError):
        assert str(Identity.parse(text)) == text


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        frames,
        messages,
        packets,
        codecs,
        merged,
        tables,
        tokens,
        verifications,
        steps,
        manifests,
        text_manifests,
        signatures,
        adverts,
        names,
    )
}
