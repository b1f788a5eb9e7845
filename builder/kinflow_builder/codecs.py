"""Fits a split's codecs to real features: step, zero level and tables. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kinflow.codec import SYMBOLS, UniformCodec, table_from_counts
from kinflow.manifest import Codec, File

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FittedCodec:
    """A codec as it goes into the bundle: `spec` names the file whose content is `table`."""

    spec: Codec
    table: bytes
    codec: UniformCodec


def fit(
    split: str, features: Array, measured: Array, step: float, trained_bits: int, bits: Literal[4, 8]
) -> FittedCodec:
    """`<split>-q<bits>`: uniform, from `features` [n, channels, height, width] before quantisation.

    `step` is the one trained with at `trained_bits`; more bits divide it, so that the range stays.
    `measured`: other features, of which the mean size is taken.
    """
    name = f"{split}-q{bits}"
    channels, height, width = features.shape[1:]
    shape = (channels, height, width)
    steps = [step / (1 << (bits - trained_bits))] * channels
    zeros = [1 << (bits - 1)] * channels

    def codec(table: bytes, bytes_mean: float) -> tuple[Codec, UniformCodec]:
        file = File(f"{name}.table", hashlib.sha256(table).hexdigest(), len(table))
        spec = Codec("uniform-rans", bits, steps, zeros, file, bytes_mean)
        return spec, UniformCodec.from_spec(name, shape, spec, table)

    # Any valid table will do for quantising; the right one comes from the levels that this gives.
    _, draft = codec(_as_bytes(table_from_counts(np.ones((channels, SYMBOLS), np.int64))), 1.0)
    table = _as_bytes(table_from_counts(_count(draft.quantise(features), bits)))
    _, fitted = codec(table, 1.0)
    size = float(np.mean([len(fitted.encode(item)) for item in measured]))
    return FittedCodec(codec(table, round(size, 2))[0], table, fitted)


def _as_bytes(table: npt.NDArray[np.uint16]) -> bytes:
    return table.astype("<u2").tobytes()


def _count(levels: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int64]:
    """Symbols per channel, int64 [channels, 256]; two neighbouring 4-bit levels make one symbol."""
    items, channels = levels.shape[:2]
    rows: npt.NDArray[np.uint8] = levels.reshape(items, channels, -1)
    if bits == 4:
        # As the codec does it: where the number is odd, the last level's neighbour is level 0.
        rows = np.pad(rows, ((0, 0), (0, 0), (0, rows.shape[2] % 2)))
        rows = np.bitwise_or(rows[..., 0::2] << 4, rows[..., 1::2], dtype=np.uint8)
    symbols = rows.transpose(1, 0, 2).reshape(channels, -1)
    return np.stack([np.bincount(row, minlength=SYMBOLS) for row in symbols]).astype(np.int64)
