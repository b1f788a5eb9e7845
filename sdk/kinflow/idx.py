"""Reads idx files, plain or gzipped: the format of the MNIST family of data sets.

Two zero bytes, a byte for the type (8 = unsigned byte), a byte for the number of axes, then each axis as a
big-endian u32, then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kinflow.errors import InputError

UNSIGNED_BYTE = 8
MAX_BYTES = 1 << 31

_GZIP = b"\x1f\x8b"


def read(path: str | Path, axes: int | None = None) -> npt.NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes; `axes`: 3 for images, 1 for labels, None for any.

    Raises InputError that names the file, what was expected and what was found.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as exc:
        raise InputError(f"{path}: {exc.strerror}: expected an idx file") from exc
    return parse(content(raw, path), path, axes)


def content(raw: bytes, path: str | Path) -> bytes:
    """The file without gzip. Raises InputError when it is a broken gzip file."""
    if not raw.startswith(_GZIP):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as exc:
        raise InputError(f"{path}: expected a whole gzip file, found a broken one: {exc}") from exc


def parse(raw: bytes, path: str | Path, axes: int | None = None) -> npt.NDArray[np.uint8]:
    """The array in `raw`, the content of an idx file; `path` is for the errors."""
    if len(raw) < 4 or raw[:2] != b"\0\0":
        found = raw[:4].hex() or "nothing"
        raise InputError(f"{path}: expected an idx file, which begins with two zero bytes, found {found}")
    kind, found_axes = raw[2], raw[3]
    if kind != UNSIGNED_BYTE:
        raise InputError(f"{path}: expected idx values of type 8 (unsigned bytes), found type {kind}")
    if found_axes == 0 or (axes is not None and found_axes != axes):
        raise InputError(f"{path}: expected an idx array with {axes or 'some'} axes, found {found_axes}")
    begin = 4 + 4 * found_axes
    if len(raw) < begin:
        raise InputError(f"{path}: expected an idx header of {begin} bytes, found {len(raw)}")
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, begin, 4))
    expected = math.prod(shape)
    if expected > MAX_BYTES or len(raw) - begin != expected:
        raise InputError(f"{path}: expected {expected} values for the shape {shape}, found {len(raw) - begin}")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape)


def write(path: str | Path, values: npt.NDArray[np.uint8]) -> None:
    """Gzipped when `path` ends in .gz; the same values give the same file."""
    raw = bytes((0, 0, UNSIGNED_BYTE, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    raw += values.astype(np.uint8).tobytes()
    Path(path).write_bytes(gzip.compress(raw, 9, mtime=0) if str(path).endswith(".gz") else raw)
