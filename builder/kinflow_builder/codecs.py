"""Fits a split's codecs to real features: step, zero level and tables. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.codec import SYMBOLS, UniformCodec, context_rows, pack_table, table_from_counts
from kinflow.manifest import Codec, Context, File, Merge
from kinflow.tokens import FeatureCodec, TokenMergeCodec

Array = npt.NDArray[np.float32]
Kind = TypeVar("Kind", bound=FeatureCodec, covariant=True)


@dataclass(frozen=True)
class FittedCodec(Generic[Kind]):
    """A codec as it goes into the bundle: `spec` names the file whose content is `table`."""

    spec: Codec
    table: bytes
    codec: Kind


def fit(
    name: str, features: Array, measured: Array, step: float, bits: Literal[4, 8], context: Context = "channel"
) -> FittedCodec[UniformCodec]:
    """A codec for `features` [n, channels, height, width] before quantisation; `step` is every channel's.

    `measured`: other features, of which the mean size is taken.
    """
    channels, height, width = features.shape[1:]
    shape = (channels, height, width)
    rows = context_rows(shape, bits, context)

    def codec(table: bytes, bytes_mean: float) -> tuple[Codec, UniformCodec]:
        file = File(f"{name}.table", hashlib.sha256(table).hexdigest(), len(table))
        spec = Codec("uniform-rans", bits, [step] * channels, [1 << (bits - 1)] * channels, file, bytes_mean, context)
        return spec, UniformCodec.from_spec(name, shape, spec, table)

    # Any valid table will do for quantising; the right one comes from the levels that this gives.
    _, draft = codec(pack_table(table_from_counts(np.ones((rows, SYMBOLS), np.int64))), 1.0)
    coded = draft.to_symbols(draft.quantise(features))
    counts = np.stack([np.bincount(coded[:, row].ravel(), minlength=SYMBOLS) for row in range(rows)])
    table = pack_table(table_from_counts(counts.astype(np.int64)))
    _, fitted = codec(table, 1.0)
    size = float(np.mean([len(fitted.encode(item)) for item in measured]))
    return FittedCodec(codec(table, round(size, 2))[0], table, fitted)


def fit_merging(
    name: str, features: Array, measured: Array, step: float, clusters: int, neighbours: int
) -> FittedCodec[TokenMergeCodec]:
    """As `fit`, with 4 bits, for features whose tokens are merged to `clusters` first.

    Raises CodecError where the features have fewer tokens.
    """
    channels, height, width = features.shape[1:]
    merge = Merge(clusters, neighbours)

    def codec(means: FittedCodec[UniformCodec], bytes_mean: float) -> tuple[Codec, TokenMergeCodec]:
        spec = msgspec.structs.replace(means.spec, kind="token-merge", merge=merge, bytes_mean=bytes_mean)
        return spec, TokenMergeCodec.from_spec(name, (channels, height, width), spec, means.table)

    # Merging needs no table: one of any kind gives the means from which the right one is counted.
    blank = np.zeros((1, channels, clusters, 1), np.float32)
    _, draft = codec(fit(name, blank, blank, step, 4), 1.0)
    means = fit(name, np.stack([draft.merge(item)[0] for item in features]), blank, step, 4)
    _, fitted = codec(means, 1.0)
    size = float(np.mean([len(fitted.encode(item)) for item in measured]))
    return FittedCodec(codec(means, round(size, 2))[0], means.table, fitted)
