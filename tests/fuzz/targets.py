"""What is fuzzed: each target takes any bytes. Only the errors that it names may leave a parser.

What a parser accepts is written again and read again: it must mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from kinflow import frame, packet
from kinflow.address import BrokerAddress
from kinflow.advert import read_advert
from kinflow.codec import UniformCodec, table_from_counts
from kinflow.errors import BundleError, CodecError, DiscoveryError, FrameError, SettingsError
from kinflow.family import read_manifest
from kinflow.identity import Identity
from kinflow.manifest import Codec
from kinflow.signing import NO_KEYS, TrustedKeys

SHAPE = (2, 3, 5)


def _codec(bits: int, kind: str) -> UniformCodec:
    spec = Codec(kind=kind, bits=bits, step=[0.5, 2.0], zero=[8, 3], table=None, bytes_mean=1.0)  # type: ignore[arg-type]
    counts = np.random.default_rng(bits).integers(0, 50, (SHAPE[0], 256)) ** 3
    table = table_from_counts(counts).astype("<u2").tobytes() if kind == "uniform-rans" else None
    return UniformCodec.from_spec("fuzzed", SHAPE, spec, table)


CODECS = [_codec(4, "uniform-rans"), _codec(8, "uniform-rans"), _codec(4, "uniform"), _codec(8, "uniform")]


def frames(data: bytes) -> None:
    """A whole MQTT payload."""
    with suppress(FrameError):
        message, payload = frame.unpack(data)
        assert frame.unpack(frame.pack(message, payload)) == (message, payload)


def messages(data: bytes) -> None:
    """A header in a frame that is otherwise valid: a mutated frame would nearly always fail at its checksum."""
    if len(data) <= frame.MAX_HEADER_BYTES:
        frames(_framed(data))


def _framed(header: bytes) -> bytes:
    body = frame._PREFIX.pack(frame.MAGIC, frame.VERSION, len(header), 0) + header
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
    codec, coded = CODECS[data[0] % len(CODECS) if data else 0], data[1:]
    with suppress(CodecError):
        features = codec.decode(coded)
        assert features.shape == SHAPE
        assert np.isfinite(features).all()
        assert np.array_equal(codec.decode(codec.encode(features)), features)


def manifests(data: bytes) -> None:
    """A family.json."""
    with suppress(BundleError):
        manifest, _ = read_manifest(data, b"", NO_KEYS, "fuzzed")
        manifest.files()


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
    target.__name__: target for target in (frames, messages, packets, codecs, manifests, signatures, adverts, names)
}


def seeds(target: str) -> list[bytes]:
    """A few valid inputs to begin with."""
    from pathlib import Path

    from kinflow.messages import (
        Busy,
        Failure,
        Fetch,
        Hop,
        NodeStatus,
        Part,
        Release,
        Reply,
        Request,
        Served,
        Verdict,
        Verify,
    )

    identity = bytes(range(16))
    every = [
        Request(identity, "cam-1", "fashion", "1.0.0", "s1", "s1-q4", 250.0),
        Reply(identity, 3, 0.5, "cloud", "edge", True, "why", [Hop("n", "edge", 1, 2, 3, 4, 5)]),
        Busy(identity, "n", 5.0),
        Failure(identity, "n", "codec", "text"),
        NodeStatus("n", "edge", "ready", "0", [Served("fashion", "1", {"s1": ["q"]})]),
        Fetch(identity, "cam-1", "fashion", "family.json", 0, 1000),
        Part(identity, "n", 1000),
        Verify(identity, "cam-1", "lm", "1.0.0", "s1", "int8", identity, 7, 8, 4, "cloud", False, 0.7, 0.9, 5, 250.0),
        Verdict(identity, 1, 17, [0.5, 0.25], "cloud", "cloud", "n", 0, True, "why", [], 12, 1),
        Release(identity, "cam-1", identity),
    ]
    whole = [frame.pack(message, b"features") for message in every]
    manifest = Path(__file__).resolve().parents[2] / "families/fashion/bundle/family.json"
    features = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    by_target = {
        "frames": whole,
        "messages": [data[frame._PREFIX.size : -12] for data in whole],
        "packets": [packet.publish_header(b"kinflow/v1/reply/x", len(data), False) + data for data in whole],
        "codecs": [bytes([number]) + codec.encode(features) for number, codec in enumerate(CODECS)],
        "manifests": [manifest.read_bytes()],
        "signatures": [b"ed25519:" + b"00" * 32 + b" " + b"11" * 64 + b"\n"],
        "adverts": [b"edge-1\0edge\0fashion:1.0.0,other:2\0000.1.0"],
        "names": [b"[::1]:1883", b"broker.local:1", b"device.cam-1"],
    }
    return by_target[target]
