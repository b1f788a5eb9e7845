"""The codec: what is decoded is the quantised features and nothing else, at the size that entropy allows."""

from __future__ import annotations

import math
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kinflow import manifest
from kinflow.codec import BLOCK_SYMBOLS, TABLE_BITS, UniformCodec, context_rows, pack_table, table_from_counts
from kinflow.errors import CodecError
from kinflow.manifest import Context

TOTAL = 1 << TABLE_BITS
Shape = tuple[int, int, int]


def spec(
    bits: Literal[4, 8], step: list[float], zero: list[int], table: bytes, context: Context = "channel"
) -> manifest.Codec:
    file = manifest.File("t", "0" * 64, len(table))
    return manifest.Codec("uniform-rans", bits, step, zero, file, 1.0, context)


def table(counts: npt.NDArray[np.int64]) -> bytes:
    return pack_table(table_from_counts(counts))


def make(shape: Shape, bits: Literal[4, 8] = 8, counts: npt.NDArray[np.int64] | None = None) -> UniformCodec:
    """Step 1/4, the zero in the middle, a flat table unless `counts` are given."""
    if counts is None:
        counts = np.ones((shape[0], 256), np.int64)
    data = table(counts)
    return UniformCodec.from_spec(
        "test", shape, spec(bits, [0.25] * shape[0], [1 << (bits - 1)] * shape[0], data), data
    )


def bell(channels: int, width: float) -> npt.NDArray[np.int64]:
    """Counts of a bell around level 128, wider with each channel."""
    levels = np.arange(256)
    rows = [np.exp(-((levels - 128) ** 2) / (2 * (width * (c + 1)) ** 2)) * 1e6 for c in range(channels)]
    return np.asarray(rows).astype(np.int64)


@st.composite
def codecs(draw: Callable[[Any], Any]) -> UniformCodec:
    """Any small shape, odd planes among them, either width and context, tables from flat to one symbol alone."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 13)))
    bits = draw(st.sampled_from([4, 8]))
    context: Context = draw(st.sampled_from(["channel", "position"]))
    size = (context_rows(shape, bits, context), 256)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([0, 1, 20]))
    counts = (rng.random(size) ** skew * 1000).astype(np.int64)
    if draw(st.booleans()):
        counts[:] = 0
        counts[:, draw(st.integers(0, size[1] - 1))] = 10**9
    data = table(counts)
    step = rng.uniform(0.01, 3, shape[0]).tolist()
    zero = rng.integers(0, 1 << bits, shape[0]).tolist()
    return UniformCodec.from_spec("test", shape, spec(bits, step, zero, data, context), data)


@given(codecs(), st.data())
def test_decoded_features_are_the_quantised_ones(codec: UniformCodec, data: st.DataObject) -> None:
    """decode(encode(x)) is dequantise(quantise(x)) to the last bit, whatever shape, width and table."""
    values = st.floats(-1e6, 1e6, width=32)
    features = data.draw(hnp.arrays(np.float32, codec.shape, elements=values))
    decoded = codec.decode(codec.encode(features))
    assert decoded.dtype == np.float32
    assert decoded.shape == codec.shape
    assert np.array_equal(decoded, codec.dequantise(codec.quantise(features)))


@given(codecs(), st.integers(0, 2**32 - 1))
def test_every_level_survives(codec: UniformCodec, seed: int) -> None:
    """Levels, also those that the table thinks impossible, come back as they were."""
    levels = np.random.default_rng(seed).integers(0, 1 << codec.bits, codec.shape).astype(np.uint8)
    features = codec.dequantise(levels)
    assert np.array_equal(codec.quantise(codec.decode(codec.encode(features))), levels)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_is_rounding_and_clipping(bits: Literal[4, 8]) -> None:
    """level = clip(rint(x / step) + zero): off by at most half a step inside the range, at its ends outside."""
    codec = make((1, 1, 2001), bits)
    features = np.linspace(-40, 40, 2001, dtype=np.float32).reshape(codec.shape)
    expected = np.clip(np.rint(features / 0.25) + 2 ** (bits - 1), 0, 2**bits - 1)
    assert np.array_equal(codec.quantise(features), expected)
    inside = (expected > 0) & (expected < 2**bits - 1)
    assert np.abs(codec.dequantise(codec.quantise(features)) - features)[inside].max() <= 0.125


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [0.3, 2.0, 40.0])
@pytest.mark.parametrize("shape", [(2, 7, 7), (3, 16, 16), (4, 33, 31)])
def test_the_size_is_close_to_the_entropy(bits: Literal[4, 8], width: float, shape: Shape) -> None:
    """The code length that the table promises, plus a length and a few bits for each block."""
    counts = bell(shape[0], width)
    codec = make(shape, bits, counts)
    rng = np.random.default_rng(1)
    per_channel = math.prod(shape[1:]) if bits == 8 else (math.prod(shape[1:]) + 1) // 2
    # The symbols are drawn from the table itself; where an odd plane ends, the pad's half of the pair is 0.
    symbols = np.stack([rng.choice(256, per_channel, p=row / TOTAL) for row in codec.frequencies])
    if bits == 8:
        levels = symbols.reshape(shape)
    else:
        pairs = np.stack((symbols >> 4, symbols & 15), axis=2).reshape(shape[0], -1)
        levels = pairs[:, : math.prod(shape[1:])].reshape(shape)
        if math.prod(shape[1:]) % 2:
            symbols[:, -1] &= 0xF0
    frequencies = np.take_along_axis(codec.frequencies, symbols, axis=1)
    ideal_bytes = -np.log2(frequencies / TOTAL).sum() / 8
    blocks = math.ceil(symbols.size / BLOCK_SYMBOLS)
    coded = codec.encode(codec.dequantise(levels.astype(np.uint8)))
    assert ideal_bytes - 2 * blocks < len(coded) < ideal_bytes + 5 * blocks
    assert codec.symbols_per_item == symbols.size


GOLDEN = {
    8: "15002a46f18ecf848f6a71dc90ea170af508560954f607",
    4: "1a0004c0ef9f02c0ff5b582f08932b755af98fdff92693fa2432ff11",
}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_are_fixed(bits: Literal[4, 8]) -> None:
    """Fixed features give fixed bytes: the format cannot change unnoticed."""
    codec = make((2, 3, 5), bits, bell(2, 8.0))
    features = ((np.arange(30) * 7 % 23 - 11) / np.float32(4)).astype(np.float32).reshape(2, 3, 5)
    assert codec.encode(features).hex() == GOLDEN[bits]
    assert np.array_equal(codec.decode(bytes.fromhex(GOLDEN[bits])), codec.dequantise(codec.quantise(features)))


def test_the_most_expected_features_cost_next_to_nothing() -> None:
    """Where the table is sure, a whole item is a handful of bytes."""
    counts = np.zeros((4, 256), np.int64)
    counts[:, 128] = 10**6
    codec = make((4, 14, 14), 8, counts)
    assert len(codec.encode(np.zeros(codec.shape, np.float32))) < 30


@given(st.binary(max_size=400), st.sampled_from([4, 8]))
def test_random_bytes_raise_codec_errors_only(data: bytes, bits: Literal[4, 8]) -> None:
    """Noise is refused with CodecError; what passes by luck has the right shape."""
    codec = RANDOM_BYTES_CODECS[bits]
    try:
        decoded = codec.decode(data)
    except CodecError:
        return
    assert decoded.shape == codec.shape


RANDOM_BYTES_CODECS = {bits: make((2, 9, 9), bits, bell(2, 20.0)) for bits in (4, 8)}


@given(st.integers(0, 2**32 - 1), st.data())
def test_mutated_bytes_are_refused_or_are_another_items(seed: int, data: st.DataObject) -> None:
    """What decodes is exactly what encode makes of it: no two codings of one item, so nothing passes padded."""
    codec = RANDOM_BYTES_CODECS[8]
    coded = bytearray(codec.encode(np.random.default_rng(seed).normal(0, 4, codec.shape).astype(np.float32)))
    start = data.draw(st.integers(0, len(coded)))
    end = data.draw(st.integers(start, min(start + 4, len(coded))))
    coded[start:end] = data.draw(st.binary(max_size=4))
    try:
        decoded = codec.decode(bytes(coded))
    except CodecError:
        return
    assert codec.encode(decoded) == bytes(coded)


def test_every_truncation_and_extension_is_refused() -> None:
    """No prefix of a coding decodes, nor a coding with something behind it."""
    codec = make((3, 16, 16), 8, bell(3, 10.0))
    coded = codec.encode(np.random.default_rng(0).normal(0, 2, codec.shape).astype(np.float32))
    for length in range(len(coded)):
        with pytest.raises(CodecError):
            codec.decode(coded[:length])
    for tail in (b"\0", b"\0\0", coded):
        with pytest.raises(CodecError, match=f"{len(tail)} bytes too many"):
            codec.decode(coded + tail)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "in the middle of a block: 0 bytes"),
        (b"\xff\xff", "in the middle of a block: 2 bytes"),
        (b"\x84\x03" + b"\xff" * 900, "a block of 900 bytes is longer"),
        (b"\x02\x00\x01\x00", "ends with a zero byte"),
        (b"\x80\x03" + b"\xff" * 896, "holds more than its symbols"),
    ],
)
def test_each_refusal_says_what_came(data: bytes, said: str) -> None:
    """A block that is short, long, padded or overfull is named as such."""
    with pytest.raises(CodecError, match=said):
        make((1, 16, 16)).decode(data)


def test_hostile_bytes_cost_little() -> None:
    """Four megabytes of noise are refused at the first block, without time or memory of their size."""
    codec = make((2, 9, 9))
    codec.decode(codec.encode(np.zeros(codec.shape, np.float32)))
    hostile = [b"\xff" * (4 << 20), b"\x00" * (4 << 20), b"\x80\x03" + b"\x55" * (4 << 20)]
    tracemalloc.start()
    start = time.perf_counter()
    try:
        for data in hostile:
            with pytest.raises(CodecError):
                codec.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1.0


def test_features_of_another_shape_or_not_finite_are_refused() -> None:
    """The message has the shape that is taken and the one that came."""
    codec = make((2, 3, 3))
    with pytest.raises(CodecError, match=r"takes features of \(2, 3, 3\), got \(1, 2, 3, 3\)"):
        codec.encode(np.zeros((1, 2, 3, 3), np.float32))
    for value in (np.nan, np.inf, -np.inf):
        features = np.zeros((2, 3, 3), np.float32)
        features[1, 1, 1] = value
        with pytest.raises(CodecError, match="NaN or infinity"):
            codec.encode(features)


FLAT = table(np.ones((2, 256), np.int64))
SHORT_ROW = np.full((2, 256), 64, "<u2")
SHORT_ROW[1, 0] = 63
HOLE = np.full((2, 256), 64, "<u2")
HOLE[1, :2] = (0, 128)


@pytest.mark.parametrize(
    ("step", "zero", "data", "said"),
    [
        ([1.0], [0, 0], FLAT, "step and zero need 2 entries, have 1 and 2"),
        ([1.0, 1.0], [0, 0, 0], FLAT, "step and zero need 2 entries, have 2 and 3"),
        ([1.0, 1.0], [0, 0], table(np.ones((1, 256), np.int64)), "needs 2 rows of 256, 1024 bytes"),
        ([1.0, 1.0], [0, 0], zlib.compress(bytes(10**8)), "needs 2 rows of 256, 1024 bytes"),
        ([1.0, 1.0], [0, 0], FLAT[:-1], "needs 2 rows of 256, 1024 bytes"),
        ([1.0, 1.0], [0, 0], FLAT + b"x", "needs 2 rows of 256, 1024 bytes"),
        ([1.0, 1.0], [0, 0], bytes(1024), "not zlib's"),
        ([1.0, 1.0], [0, 0], pack_table(SHORT_ROW), "positive and sum to 16384"),
        ([1.0, 1.0], [0, 0], pack_table(HOLE), "positive and sum to 16384"),
        ([1.0, 1e-50], [0, 0], FLAT, "256 of it finite"),
        ([1.0, 1e39], [0, 0], FLAT, "256 of it finite"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(step: list[float], zero: list[int], data: bytes, said: str) -> None:
    """Numbers of another count, tables that cannot be coded with and steps that float32 cannot hold."""
    with pytest.raises(CodecError, match=said):
        UniformCodec.from_spec("test", (2, 3, 3), spec(8, step, zero, data), data)


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.just(256)), elements=st.integers(0, 2**31)))
def test_tables_from_counts_are_positive_and_sum_up(counts: npt.NDArray[np.int64]) -> None:
    """Anything can be coded with them, and no count is favoured over a larger one."""
    frequencies = table_from_counts(counts)
    assert frequencies.dtype == np.uint16
    assert (frequencies > 0).all()
    assert (frequencies.sum(axis=1, dtype=np.int64) == TOTAL).all()
    for row, freq in zip(counts, frequencies.astype(np.int64), strict=True):
        assert (np.diff(freq[np.argsort(row, kind="stable")]) >= 0).all() or row.max() == np.sort(row)[-2]


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_levels_travel_as_they_are(bits: Literal[4, 8]) -> None:
    """Kind `uniform`: no table, one byte for one 8-bit or two 4-bit levels, and the quantised features back."""
    plain = manifest.Codec("uniform", bits, [0.5, 0.25], [7, 8], None, 1.0)
    codec = UniformCodec.from_spec("plain", (2, 3, 3), plain, None)
    features = np.random.default_rng(3).normal(0, 1, (2, 3, 3)).astype(np.float32)
    data = codec.encode(features)
    assert len(data) == codec.symbols_per_item
    np.testing.assert_array_equal(codec.decode(data), codec.dequantise(codec.quantise(features)))
    with pytest.raises(CodecError, match="takes"):
        codec.decode(data + b"\0")


def test_a_table_belongs_to_range_coding_alone() -> None:
    """A kind without its table, or with one too many, is refused."""
    plain = manifest.Codec("uniform", 8, [1.0], [0], None, 1.0)
    with pytest.raises(CodecError, match="uniform-rans has a table"):
        UniformCodec.from_spec("plain", (1, 2, 2), plain, bytes(512))
    with pytest.raises(CodecError, match="uniform-rans has a table"):
        UniformCodec.from_spec("coded", (1, 2, 2), msgspec.structs.replace(plain, kind="uniform-rans"), None)
