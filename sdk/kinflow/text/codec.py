"""One token's hidden features <-> bytes. Pure; vectorised over tokens.

`token-int8`: each channel is divided by its usual size (few channels of a decoder are hundreds of times larger than
the others), then the token by a scale of its own, which travels as float16 before the channels' int8 values.
`token-f16`: float16 values alone. Both decode to the same floats on every machine.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kinflow.errors import CodecError
from kinflow.text.manifest import Split, TokenCodec

Array = npt.NDArray[np.float32]
LEVELS = 127
F16_MAX = float(np.finfo(np.float16).max)
# So many of a channel's usual size are the largest value that can be coded.
MOST = LEVELS * F16_MAX
# The scales that float16 holds with all of its bits; above comes infinity.
SMALLEST, LARGEST = float(np.finfo(np.float16).tiny), F16_MAX / 2


class FeatureCodec(Protocol):
    @property
    def token_bytes(self) -> int:
        """Coded size of one token."""

    def encode(self, features: Array) -> bytes:
        """`features`: [tokens, width]. Raises CodecError when they are not finite."""

    def decode(self, data: bytes | memoryview, tokens: int) -> Array:
        """float32 [tokens, width]. Raises CodecError when `data` is not `tokens` tokens."""


class Int8Codec:
    """`token-int8` for one split."""

    def __init__(self, scale: Array) -> None:
        """`scale`: [width], the channels' usual sizes."""
        self._scale = scale
        self.token_bytes = 2 + len(scale)

    def encode(self, features: Array) -> bytes:
        _check_finite(features)
        relative = features / self._scale
        size = np.abs(relative).max(axis=1, keepdims=True) / LEVELS
        # The next float16 up: the largest value must not pass the last level.
        step = np.nextafter(np.clip(size, SMALLEST, LARGEST).astype(np.float16), np.float16(np.inf))
        levels = np.rint(relative / step.astype(np.float32))
        coded = np.clip(levels, -LEVELS, LEVELS).astype(np.int8)
        return np.hstack([step.astype("<f2").view(np.uint8), coded.view(np.uint8)]).tobytes()

    def decode(self, data: bytes | memoryview, tokens: int) -> Array:
        rows = _rows(data, tokens, self.token_bytes)
        step = np.ascontiguousarray(rows[:, :2]).view("<f2").astype(np.float32)
        if not np.isfinite(step).all():
            raise CodecError("a token's scale is not finite")
        return rows[:, 2:].view(np.int8).astype(np.float32) * step * self._scale


class F16Codec:
    """`token-f16`."""

    def __init__(self, width: int) -> None:
        self.token_bytes = 2 * width

    def encode(self, features: Array) -> bytes:
        _check_finite(features)
        if np.abs(features).max(initial=0) > F16_MAX:
            raise CodecError(f"a feature of {np.abs(features).max():g} does not fit in float16")
        return features.astype("<f2").tobytes()

    def decode(self, data: bytes | memoryview, tokens: int) -> Array:
        values = np.ascontiguousarray(_rows(data, tokens, self.token_bytes)).view("<f2").astype(np.float32)
        _check_finite(values)
        return values


def open_codec(name: str, spec: TokenCodec, width: int) -> FeatureCodec:
    """Raises CodecError when the manifest's scale does not fit the model."""
    if spec.kind == "token-f16":
        return F16Codec(width)
    if len(spec.scale) != width:
        raise CodecError(f"codec {name!r}: scale has {len(spec.scale)} values, the model's width is {width}")
    with np.errstate(over="ignore"):
        scale = np.array(spec.scale, np.float32)
        largest = np.float32(LEVELS * F16_MAX) * scale
    if not (np.isfinite(largest).all() and (scale > 0).all()):
        raise CodecError(
            f"codec {name!r}: each scale must be positive, and {LEVELS * F16_MAX:g} of it finite, as float32"
        )
    return Int8Codec(scale)


def open_codecs(split: Split, width: int) -> dict[str, FeatureCodec]:
    return {name: open_codec(name, spec, width) for name, spec in split.codecs.items()}


def _rows(data: bytes | memoryview, tokens: int, token_bytes: int) -> npt.NDArray[np.uint8]:
    if len(data) != tokens * token_bytes:
        raise CodecError(f"{tokens} tokens of {token_bytes} bytes are {tokens * token_bytes}, got {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(tokens, token_bytes)


def _check_finite(features: Array) -> None:
    if not np.isfinite(features).all():
        raise CodecError("the features are not finite")
