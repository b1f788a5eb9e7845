"""Valid inputs for each target: where a fuzzer begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from targets import CODECS, MERGING, SHAPE, TABLE, TEXT
from text_manifest import TEXT_MANIFEST

from kinflow import frame, packet
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
from kinflow.text.codec import FeatureCodec

ID = bytes(range(16))
EVERY = [
    Request(ID, "cam-1", "fashion", "1.0.0", "s1", "s1-q4", 250.0),
    Reply(ID, 3, 0.5, "cloud", "edge", True, "why", [Hop("n", "edge", 1, 2, 3, 4, 5)]),
    Busy(ID, "n", 5.0),
    Failure(ID, "n", "codec", "text"),
    NodeStatus("n", "edge", "ready", "0", [Served("fashion", "1", {"s1": ["q"]})]),
    Fetch(ID, "cam-1", "fashion", "family.json", 0, 1000),
    Part(ID, "n", 1000),
    Verify(ID, "cam-1", "lm", "1.0.0", "s1", "int8", ID, 7, 8, 4, "cloud", False, 0.7, 0.9, 5, 250.0),
    Verdict(ID, 1, 17, [0.5, 0.25], "cloud", "cloud", "n", 0, True, "why", [], 12, 1),
    Release(ID, "cam-1", ID),
]
FEATURES = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
BUNDLE = Path(__file__).resolve().parents[2] / "families/fashion/bundle"


def seeds(target: str) -> list[bytes]:
    """A few, none of them refused."""
    whole = [frame.pack(message, b"features") for message in EVERY]
    asked = _verifications()
    by_target = {
        "frames": whole,
        "messages": [data[frame._PREFIX.size : -12] for data in whole],
        "packets": [packet.publish_header(b"kinflow/v1/reply/x", len(data), False) + data for data in whole],
        "codecs": [bytes([number]) + codec.encode(FEATURES) for number, codec in enumerate(CODECS)],
        "merged": [bytes([number]) + codec.encode(FEATURES) for number, codec in enumerate(MERGING)],
        "tables": [TABLE],
        "tokens": [
            bytes([number, 3]) + codec.encode(_token_features(3)) for number, codec in enumerate(_token_codecs())
        ],
        "verifications": [frame.pack(verify, payload) for verify, payload in asked],
        "steps": [_step(frame.pack(verify, payload)) for verify, payload in asked],
        "manifests": [(BUNDLE / "family.json").read_bytes()],
        "text_manifests": [TEXT_MANIFEST],
        "signatures": [b"ed25519:" + b"00" * 32 + b" " + b"11" * 64 + b"\n"],
        "adverts": [b"edge-1\0edge\0fashion:1.0.0,other:2\0000.1.0"],
        "names": [b"[::1]:1883", b"broker.local:1", b"device.cam-1"],
    }
    return by_target[target]


def _token_codecs() -> list[FeatureCodec]:
    return list(TEXT.family.codecs.values())


def _token_features(count: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, TEXT.family.manifest.width)).astype(np.float32)


def _verifications() -> list[tuple[Verify, bytes]]:
    """With features of each codec, and with token ids alone."""
    count = 4
    asked = []
    ids = np.arange(count).astype("<u4").tobytes()
    for (split, name), codec in TEXT.family.codecs.items():
        exact = name == "f16"
        verify = Verify(ID, "cam-1", "lm", "1.0.0", split, name, ID, 7, 8, count, "cloud", exact, 0, 1, 5, 250.0)
        asked.append((verify, ids + codec.encode(_token_features(count))))
    asked.append((Verify(ID, "c", "lm", "1.0.0", "ids", "ids", ID, 0, 1, count, "edge", True, 1, 0.9, 0, 9.0), ids))
    return asked


def _step(data: bytes) -> bytes:
    """A frame as the target `steps` takes it."""
    header_bytes = frame._PREFIX.unpack_from(data)[2]
    return header_bytes.to_bytes(2, "little") + data[frame._PREFIX.size : -frame._CRC.size]
