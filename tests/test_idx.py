"""Reading and writing idx files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from kinflow import idx
from kinflow.errors import InputError

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    """What is written, plain or gzipped, is read back."""
    idx.write(tmp_path / name, VALUES)
    np.testing.assert_array_equal(idx.read(tmp_path / name, 3), VALUES)


def test_known_bytes(tmp_path: Path) -> None:
    """A file written by hand after the format's description is read as it should be."""
    (tmp_path / "labels").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 255]))
    np.testing.assert_array_equal(idx.read(tmp_path / "labels", 1), [7, 0, 255])


def test_same_values_same_file(tmp_path: Path) -> None:
    """Gzipped files hold no time stamp, so that a rebuilt sample file is the committed one."""
    for name in ("a.gz", "b.gz"):
        idx.write(tmp_path / name, VALUES)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize(
    ("content", "axes", "expected"),
    [
        (b"", None, "two zero bytes"),
        (b"\x89PNG", None, "found 89504e47"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0]), None, "found type 13"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 5]), 3, "with 3 axes, found 1"),
        (bytes([0, 0, 8, 0]), None, "found 0"),
        (bytes([0, 0, 8, 3, 0, 0]), 3, "header of 16 bytes, found 6"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3]), 1, "expected 4 values for the shape (4,), found 3"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 2, 3]), 1, "expected 2 values for the shape (2,), found 3"),
        (bytes([0, 0, 8, 3, *([255] * 12)]), 3, "found 0"),
        (gzip.compress(bytes(100), mtime=0)[:-9], None, "broken one"),
    ],
)
def test_wrong_content(tmp_path: Path, content: bytes, axes: int | None, expected: str) -> None:
    """Every kind of damage is an InputError with the file, what was expected and what was found."""
    path = tmp_path / "some-idx"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        idx.read(path, axes)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is an InputError too."""
    with pytest.raises(InputError, match="No such file"):
        idx.read(tmp_path / "nothing")
