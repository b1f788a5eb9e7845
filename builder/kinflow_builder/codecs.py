"""Fits a split's codecs to real features: step, zero level and tables. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kinflow.codec import SYMBOLS, UniformRansCodec, table_from_counts
from kinflow.manifest import Codec, File

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FittedCodec:
    """A codec as it goes into the bundle: `spec` names the file whose content is `table`."""

    name: str
    spec: Codec
    table: bytes
    codec: UniformRansCodec


def fit(split: str, features: Array, measured: Array, step: float, trained_bits: int, bits: int) -> FittedCodec:
    """`<split>-q<bits>`: uniform, from `features` [n, channels, height, width] before quantisation.

    `step` is the one trained with at `trained_bits`; more bits divide it, so that the range stays.
    `measured`: other features, of which the mean size is taken.
    """
    channels, height, width = features.shape[1:]
    name = f"{split}-q{bits}"
    steps = [step / (1 << (bits - trained_bits))] * channels
    zeros = [1 << (bits - 1)] * channels
    draft = UniformRansCodec(
        name,
        (channels, height, width),
        bits,
        np.asarray(steps, np.float32).reshape(-1, 1, 1),
        np.asarray(zeros, np.int32).reshape(-1, 1, 1),
        np.full((channels, SYMBOLS), 1, np.uint16),
    )
    table = table_from_counts(_count(draft.quantise(features), bits)).astype("<u2").tobytes()
    spec = Codec("uniform-rans", bits, steps, zeros, _unwritten(f"{name}.table"), 1.0)  # type: ignore[arg-type]
    codec = UniformRansCodec.from_spec(name, (channels, height, width), spec, table)
    size = float(np.mean([len(codec.encode(item)) for item in measured]))
    spec = Codec("uniform-rans", bits, steps, zeros, _unwritten(f"{name}.table"), round(size, 2))  # type: ignore[arg-type]
    return FittedCodec(name, spec, table, codec)


def _count(levels: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int64]:
    """Symbols per channel, int64 [channels, 256]; two neighbouring 4-bit levels make one symbol."""
    channels = levels.shape[1]
    flat = levels.transpose(1, 0, 2, 3).reshape(channels, -1)
    symbols = flat if bits == 8 else flat[:, 0::2] << 4 | flat[:, 1::2]
    return np.stack([np.bincount(row, minlength=SYMBOLS) for row in symbols]).astype(np.int64)


def _unwritten(path: str) -> File:
    """The bundle fills in digest and size when it writes the file."""
    return File(path, "0" * 64, 1)
