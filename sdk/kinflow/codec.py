"""Features <-> bytes: a uniform quantiser per channel, then range coding with tables that the bundle ships.

Kind `uniform-rans` does both. Kind `uniform` sends the levels as they are: for large features on a fast link,
where coding would take longer than sending.

A value becomes a level, `clip(round(x / step) + zero)`, of 8 or 4 bits. Two neighbouring 4-bit levels make one
symbol, so that their correlation is coded too, and a decoder has half the steps. Symbols are coded by rANS (Duda,
arXiv 1311.2540) with fixed tables. In the context `channel` all positions of a channel share its table, and pairs
stay within a channel; in the context `position` every symbol has a table of its own, which pays where all images
have the same layout.

The coder's state is one Python integer per block, never renormalised: no
state is flushed, so the coded size is the ideal one to within a byte and a length per block. Everything from
the bytes back to the levels is integer arithmetic, and `(level - zero) * step` is one exact difference and one
float32 product, so all machines decode the same features.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kinflow.errors import CodecError
from kinflow.manifest import Codec as CodecSpec
from kinflow.manifest import Context

TABLE_BITS = 14
SYMBOLS = 256
_TOTAL = 1 << TABLE_BITS
_MASK = _TOTAL - 1
# A block's integer grows by its own coded size: past some hundred bytes the growing costs more than a new block.
BLOCK_SYMBOLS = 512

Features = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class UniformCodec:
    """Codes features of `shape` [channels, height, width].

    `step` and `zero` have one entry per channel. `frequencies` is uint16 [rows, symbols], each row summing to 2**14:
    [channels, 256], or [symbols of an item, 256] where each position is a context; with no rows the levels are sent as
    they are. Made by `UniformCodec.from_spec`, which checks all of it.
    """

    name: str
    shape: tuple[int, int, int]
    bits: int
    lines: int
    """Levels are paired within each of so many equal parts of an item: its channels, or all of it."""
    step: Features
    zero: Features
    """A level, so whole; float32, like all that it is taken from."""
    frequencies: npt.NDArray[np.uint16]

    @classmethod
    def from_spec(cls, name: str, shape: tuple[int, int, int], spec: CodecSpec, table: bytes | None) -> UniformCodec:
        """Raises CodecError when the table and the numbers do not fit the split's shape."""
        channels = shape[0]
        if len(spec.step) != channels or len(spec.zero) != channels:
            raise CodecError(
                f"codec {name!r}: step and zero need {channels} entries, have {len(spec.step)} and {len(spec.zero)}"
            )
        if (table is not None) != (spec.kind == "uniform-rans"):
            raise CodecError(f"codec {name!r}: kind uniform-rans has a table, kind uniform has none")
        lines = _lines(shape, spec.context)
        rows = context_rows(shape, spec.bits, spec.context)
        frequencies = np.empty((0, SYMBOLS), np.uint16) if table is None else _frequencies(name, rows, table)
        with np.errstate(over="ignore"):
            step = np.asarray(spec.step, np.float32).reshape(-1, 1, 1)
            largest = step * np.float32(SYMBOLS)
        if not (np.isfinite(largest).all() and (step > 0).all()):
            raise CodecError(f"codec {name!r}: each step must be positive, and {SYMBOLS} of it finite, as float32")
        zero = np.asarray(spec.zero, np.float32).reshape(-1, 1, 1)
        return cls(name, shape, spec.bits, lines, step, zero, frequencies)

    def quantise(self, features: Features) -> npt.NDArray[np.uint8]:
        """Levels, uint8, in the shape of the features."""
        # In place from here on: each copy of large features would push out of the cache what comes after.
        levels = features / self.step
        np.rint(levels, out=levels)
        levels += self.zero
        np.clip(levels, 0, (1 << self.bits) - 1, out=levels)
        return levels.astype(np.uint8)

    def dequantise(self, levels: npt.NDArray[np.uint8]) -> Features:
        """The features that `levels` stand for, float32."""
        features = levels.astype(np.float32)
        features -= self.zero
        features *= self.step
        return features

    def encode(self, features: Features) -> bytes:
        """Coded bytes of one item. Raises CodecError on another shape or values that are not finite."""
        if features.shape != self.shape:
            raise CodecError(f"codec {self.name!r} takes features of {self.shape}, got {features.shape}")
        if not np.isfinite(features).all():
            raise CodecError(f"codec {self.name!r}: the features hold NaN or infinity")
        symbols = self.to_symbols(self.quantise(features)[None]).reshape(-1)
        if not len(self.frequencies):
            return symbols.tobytes()
        index = self._row_starts + symbols.astype(np.intp)
        return _encode_blocks(
            self.frequencies.ravel()[index].tolist(),
            self._cumulative.ravel()[index].tolist(),
        )

    def decode(self, data: bytes | memoryview) -> Features:
        """Features of one item, float32. Raises CodecError when `data` is not what `encode` made."""
        if not len(self.frequencies):
            if len(data) != self.symbols_per_item:
                raise CodecError(f"codec {self.name!r} takes {self.symbols_per_item} bytes, got {len(data)}")
            return self.dequantise(self._to_levels(np.frombuffer(data, np.uint8)))
        symbols = bytes(_decode_blocks(data, self._lookup))
        return self.dequantise(self._to_levels(np.frombuffer(symbols, np.uint8)))

    @cached_property
    def symbols_per_item(self) -> int:
        return self.lines * _symbols_of_line(self.shape, self.bits, self.lines)

    def to_symbols(self, levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """What is coded, [n, rows, symbols of a row], from the levels of n items [n, channels, height, width]."""
        symbols = levels.reshape(len(levels), self.lines, -1)
        if self.bits == 4:
            # A line's last level without a neighbour is paired with level 0: pairs never span two lines.
            symbols = np.pad(symbols, ((0, 0), (0, 0), (0, symbols.shape[2] % 2)))
            symbols = np.asarray(symbols[..., 0::2] << 4 | symbols[..., 1::2], np.uint8)
        return symbols.reshape(len(levels), len(self.frequencies) or self.lines, -1)

    def _to_levels(self, symbols: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        levels = np.stack((symbols >> 4, symbols & 15), axis=1) if self.bits == 4 else symbols
        values = math.prod(self.shape) // self.lines
        return np.asarray(levels, np.uint8).reshape(self.lines, -1)[:, :values].reshape(self.shape)

    @cached_property
    def _cumulative(self) -> npt.NDArray[np.int64]:
        totals = np.cumsum(self.frequencies, axis=1, dtype=np.int64)
        return totals - self.frequencies

    @cached_property
    def _row_starts(self) -> npt.NDArray[np.intp]:
        """Where the row of each symbol begins in the flattened table."""
        rows, symbols = self.frequencies.shape
        return np.repeat(np.arange(rows) * symbols, self.symbols_per_item // rows)

    @cached_property
    def _lookup(self) -> list[_Row]:
        """The row of each symbol."""
        rows = [_row(f.tolist(), c.tolist()) for f, c in zip(self.frequencies, self._cumulative, strict=True)]
        return [row for row in rows for _ in range(self.symbols_per_item // len(rows))]


# One context's table as the decoder wants it: the likeliest symbol's interval from start to end, its frequency and
# itself; then all frequencies and starts. A plain tuple: a named one takes three times as long to unpack.
_Row = tuple[int, int, int, int, list[int], list[int]]


def _row(frequencies: list[int], starts: list[int]) -> _Row:
    frequency = max(frequencies)
    symbol = frequencies.index(frequency)
    return starts[symbol], starts[symbol] + frequency, frequency, symbol, frequencies, starts


def context_rows(shape: tuple[int, int, int], bits: int, context: Context) -> int:
    """How many rows the table of such a codec has."""
    lines = _lines(shape, context)
    return lines * _symbols_of_line(shape, bits, lines) if context == "position" else lines


def _lines(shape: tuple[int, int, int], context: Context) -> int:
    return 1 if context == "position" else shape[0]


def _symbols_of_line(shape: tuple[int, int, int], bits: int, lines: int) -> int:
    values = math.prod(shape) // lines
    return (values + 1) // 2 if bits == 4 else values


def _frequencies(name: str, rows: int, table: bytes) -> npt.NDArray[np.uint16]:
    size = rows * SYMBOLS * 2
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(table, size + 1)
    except zlib.error as exc:
        raise CodecError(f"codec {name!r}: its table is not zlib's: {exc}") from exc
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise CodecError(
            f"codec {name!r}: its table needs {rows} rows of {SYMBOLS}, {size} bytes, holds other than that"
        )
    frequencies = np.frombuffer(raw, "<u2").astype(np.uint16).reshape(rows, SYMBOLS)
    if (frequencies.sum(axis=1, dtype=np.int64) != _TOTAL).any() or (frequencies == 0).any():
        raise CodecError(f"codec {name!r}: each table row must be positive and sum to {_TOTAL}")
    return frequencies


def table_from_counts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """Frequencies uint16 [rows, symbols] from symbol counts of the same shape: positive, each row 2**14.

    Every symbol gets at least 1, so that anything can be coded; the rest is shared in proportion, and what
    rounding leaves goes to the most frequent symbol.
    """
    spare = _TOTAL - counts.shape[1]
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    frequencies = 1 + counts * spare // totals
    rows = np.arange(len(frequencies))
    frequencies[rows, counts.argmax(axis=1)] += _TOTAL - frequencies.sum(axis=1)
    return np.asarray(frequencies, np.uint16)


def pack_table(frequencies: npt.NDArray[np.uint16]) -> bytes:
    """As it stands in a bundle: most of its entries are alike, so zlib makes a tenth of it."""
    return zlib.compress(frequencies.astype("<u2").tobytes(), 9)


def _encode_blocks(frequencies: list[int], starts: list[int]) -> bytes:
    """Each block: u16 length, then the state's little-endian bytes. Symbols go in last first (rANS is a stack)."""
    parts = []
    for begin in range(0, len(frequencies), BLOCK_SYMBOLS):
        state = 0
        block = slice(begin, begin + BLOCK_SYMBOLS)
        for frequency, start in zip(reversed(frequencies[block]), reversed(starts[block]), strict=True):
            quotient, remainder = divmod(state, frequency)
            state = (quotient << TABLE_BITS) + remainder + start
        coded = state.to_bytes((state.bit_length() + 7) // 8, "little")
        parts.append(len(coded).to_bytes(2, "little"))
        parts.append(coded)
    return b"".join(parts)


def _decode_blocks(data: bytes | memoryview, rows: list[_Row]) -> list[int]:
    """`rows` has the table of each symbol. A block must be used up exactly: its state ends at 0."""
    symbols: list[int] = []
    position = 0
    for begin in range(0, len(rows), BLOCK_SYMBOLS):
        length = int.from_bytes(data[position : position + 2], "little")
        position += 2
        if position + length > len(data):
            raise CodecError(f"coded features end in the middle of a block: {len(data)} bytes")
        # No valid block is longer: each symbol adds at most TABLE_BITS bits.
        if length * 8 > BLOCK_SYMBOLS * TABLE_BITS + 8:
            raise CodecError(f"a block of {length} bytes is longer than any block can be")
        state = int.from_bytes(data[position : position + length], "little")
        position += length
        if length and not data[position - 1]:
            raise CodecError("a block ends with a zero byte: its length is wrong")
        # Most of what a server does in Python is this loop: the state is long, so it is touched three times only.
        for start, end, frequency, likeliest, frequencies, starts in rows[begin : begin + BLOCK_SYMBOLS]:
            slot = state & _MASK
            if start <= slot < end:
                state = frequency * (state >> TABLE_BITS) + (slot - start)
                symbols.append(likeliest)
            else:
                symbol = bisect_right(starts, slot) - 1
                state = frequencies[symbol] * (state >> TABLE_BITS) + (slot - starts[symbol])
                symbols.append(symbol)
        if state:
            raise CodecError("coded features do not decode: a block holds more than its symbols")
    if position != len(data):
        raise CodecError(f"coded features have {len(data) - position} bytes too many")
    return symbols
