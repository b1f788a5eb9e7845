"""Codecs fitted to features: exact, small, and without a torch in sight."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import pytest

from kinflow.codec import SYMBOLS
from kinflow_builder import codecs


def features(shape: tuple[int, int, int], seed: int) -> codecs.Array:
    """Smooth-tailed values, most of them within one step of 0, as a trained bottleneck's are."""
    random = np.random.default_rng(seed)
    return random.laplace(0, 0.8, (200, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(4, 14, 14), (3, 7, 7)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("context", ["channel", "position"])
def test_round_trip(shape: tuple[int, int, int], bits: Literal[4, 8], context: codecs.Context) -> None:
    """What comes back is the quantised features, for even and odd planes, either width and context."""
    fitted = codecs.fit("s1-q", features(shape, 0), features(shape, 1), 1.5, bits, context)
    for item in features(shape, 2)[:20]:
        back = fitted.codec.decode(fitted.codec.encode(item))
        np.testing.assert_array_equal(back, fitted.codec.dequantise(fitted.codec.quantise(item)))
        inside = np.abs(item) < 10
        assert np.abs(back - item)[inside].max() <= 1.5 / 2 + 1e-6
    assert (fitted.codec.name, fitted.spec.context) == ("s1-q", context)


@pytest.mark.parametrize("shape", [(4, 14, 14), (3, 7, 7)])
def test_tables_fit_the_levels(shape: tuple[int, int, int]) -> None:
    """Coded with tables of its own kind, an item takes about its entropy, and far less than packed levels."""
    fitted = codecs.fit("s1-q4", features(shape, 0), features(shape, 1), 1.5, 4)
    levels = fitted.codec.quantise(features(shape, 3))
    entropy_bits = 0.0
    for channel in range(shape[0]):
        share = np.bincount(levels[:, channel].ravel(), minlength=16) / levels[:, channel].size
        entropy_bits -= float((share[share > 0] * np.log2(share[share > 0])).sum()) * shape[1] * shape[2]
    blocks = -(-fitted.codec.symbols_per_item // 512)
    assert fitted.spec.bytes_mean <= 1.05 * entropy_bits / 8 + 4 * blocks
    assert fitted.spec.bytes_mean < np.prod(shape) / 2


def test_positions_that_differ_are_cheaper_in_their_own_context() -> None:
    """Where the border of every plane is empty, a table for each position saves what the middle's costs there."""
    mask = np.zeros((7, 7), np.float32)
    mask[2:5, 2:5] = 4.0
    drawn = [features((4, 7, 7), seed) * mask for seed in (0, 1)]
    shared = codecs.fit("s1-q4", *drawn, 1.0, 4).spec.bytes_mean
    own = codecs.fit("s1-q4", *drawn, 1.0, 4, "position").spec.bytes_mean
    assert own < 0.8 * shared


def test_table_is_what_the_manifest_says() -> None:
    """The file's size and digest in the manifest are those of the table itself."""
    fitted = codecs.fit("s2-q4", features((3, 7, 7), 0), features((3, 7, 7), 1), 1.0, 4)
    assert fitted.spec.table.bytes == len(fitted.table)
    assert len(zlib.decompress(fitted.table)) == 3 * SYMBOLS * 2
    assert fitted.spec.table.path == "s2-q4.table"


def test_merged_tokens_cost_less_and_fit_their_table() -> None:
    """Where half of the tokens are alike, merging them saves bytes and changes little, with tables of its own."""
    random = np.random.default_rng(0)
    drawn = features((24, 16, 1), 0)
    drawn[:, :, 8:] = drawn[:, :, 8:9] + random.normal(0, 0.05, drawn[:, :, 8:].shape)
    plain = codecs.fit("s1-q4", drawn, drawn[:50], 0.5, 4)
    merged = codecs.fit_merging("s1-m9", drawn, drawn[:50], 0.5, 9, 3)
    assert merged.spec.kind == "token-merge"
    assert merged.spec.merge is not None
    assert merged.spec.table.path == "s1-m9.table"
    assert merged.spec.bytes_mean < 0.9 * plain.spec.bytes_mean
    item = drawn[60]
    error = np.abs(merged.codec.decode(merged.codec.encode(item)) - item).mean()
    assert error < 1.5 * np.abs(plain.codec.decode(plain.codec.encode(item)) - item).mean()
