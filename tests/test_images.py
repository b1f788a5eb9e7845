"""Image files, idx files and raw frames become arrays, and everything else a named error."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinflow import idx
from kinflow.errors import InputError, SettingsError
from kinflow.images import labels_beside, read_image, sources
from kinflow.manifest import Preprocess

GREY = Preprocess("L", 4, 4, [0.0], [1.0], "stretch")
COLOUR = Preprocess("RGB", 4, 4, [0.0] * 3, [1.0] * 3, "stretch")
CROP = Preprocess("L", 4, 4, [0.0], [1.0], "crop")


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def ramp() -> Image.Image:
    return Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)


def test_an_image_of_the_right_size_keeps_every_pixel(tmp_path: Path) -> None:
    """Nothing is resampled that need not be; path, text and bytes give the same."""
    path = tmp_path / "ramp.png"
    path.write_bytes(png(ramp()))
    for source in (path, str(path), path.read_bytes()):
        pixels = read_image(source, GREY)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.asarray(ramp()))


def test_grey_becomes_colour_and_colour_grey() -> None:
    """The manifest's mode decides the shape."""
    assert read_image(png(ramp()), COLOUR).shape == (4, 4, 3)
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert read_image(png(red), GREY).tolist() == [[76] * 4] * 4  # ITU-R 601 luma of pure red


def test_resize_stretches_or_crops_as_the_manifest_says() -> None:
    """A wide picture, black | white | black: stretching keeps the black edges, cropping cuts them off."""
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    data = png(Image.fromarray(wide))
    assert read_image(data, GREY).min() < 10
    assert read_image(data, CROP).min() > 200


def test_exif_orientation_is_obeyed() -> None:
    """A phone held sideways stores the turn, not the turned pixels."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stream = io.BytesIO()
    ramp().save(stream, "PNG", exif=exif)
    assert np.array_equal(read_image(stream.getvalue(), GREY), np.asarray(ramp())[::-1, ::-1])


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """Pillow's own conversion would turn nearly all of it white."""
    deep = Image.fromarray((np.arange(16, dtype=np.uint16).reshape(4, 4)) * 4096)
    assert np.array_equal(read_image(png(deep), GREY), np.asarray(ramp()))


def test_transparency_becomes_black() -> None:
    """Hidden pixels must not show through."""
    hidden = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert read_image(png(hidden), GREY).max() == 0


def damaged(kind: str) -> bytes:
    whole = png(Image.effect_noise((64, 64), 90), kind)
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"this is no image", "not an image"),
        (damaged("PNG"), "truncated"),
        (damaged("JPEG"), "truncated"),
        (damaged("BMP"), "truncated"),
        (damaged("TIFF"), "not an image|truncated"),
        (png(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floats"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path, data: bytes, what: str) -> None:
    """Whatever Pillow raises, the app sees InputError and the file's name."""
    path = tmp_path / "holiday.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"holiday.png.*({what})"):
        read_image(path, GREY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The system's own reason stands beside the name."""
    with pytest.raises(InputError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png", GREY)


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    """A few kilobytes of PNG can unpack to gigabytes."""
    bomb = png(Image.new("1", (9000, 8000)))
    assert len(bomb) < 20_000
    with pytest.raises(InputError, match="9000x8000"):
        read_image(bomb, GREY)


def test_without_pillow_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that feeds camera frames needs no Pillow; only reading files does."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SettingsError, match=r"kinflow\[cli\]"):
        read_image(b"x", GREY)


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    """Sub-folders too; other files are left alone."""
    for name in ("b.png", "a.png", "sub/c.PNG", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(ramp()))
    items = list(sources([tmp_path], GREY))
    assert [Path(item.name).name for item in items] == ["a.png", "b.png", "c.PNG"]
    assert all(item.truth is None and item.image.shape == (4, 4) for item in items)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    """Nothing to do is most often a wrong path."""
    with pytest.raises(InputError, match="holds no image"):
        list(sources([tmp_path], GREY))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_brings_the_labels_beside_it(tmp_path: Path, suffix: str) -> None:
    """The usual names of MNIST's files are recognised, gzipped or not."""
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    idx.write(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images)
    idx.write(tmp_path / "t10k-labels-idx1-ubyte", np.array([2, 0, 1], np.uint8))
    items = list(sources([tmp_path / f"t10k-images-idx3-ubyte{suffix}"], GREY))
    assert [item.truth for item in items] == [2, 0, 1]
    assert np.array_equal(items[1].image, images[1])


def test_an_idx_file_alone_has_no_truth(tmp_path: Path) -> None:
    """Labels are a gift, not a need."""
    idx.write(tmp_path / "images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    assert labels_beside(tmp_path / "images-idx3-ubyte") is None
    assert [item.truth for item in sources([tmp_path / "images-idx3-ubyte"], GREY)] == [None, None]


def test_idx_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Images of another size, and labels of another number."""
    idx.write(tmp_path / "images-idx3-ubyte", np.zeros((2, 5, 5), np.uint8))
    with pytest.raises(InputError, match=r"\(5, 5\).*\(4, 4\)"):
        list(sources([tmp_path / "images-idx3-ubyte"], GREY))
    idx.write(tmp_path / "images-idx3-ubyte", np.zeros((2, 4, 4), np.uint8))
    idx.write(tmp_path / "labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(InputError, match="3 labels for the 2 images"):
        list(sources([tmp_path / "images-idx3-ubyte"], GREY))


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 5))


def test_raw_frames_are_cut_from_the_stream() -> None:
    """A pipe's pieces do not fall on the borders of frames."""
    data = bytes(range(96))
    items = list(sources(["-"], COLOUR, stdin=Trickle(data)))  # type: ignore[arg-type]
    assert [item.name for item in items] == ["-[0]", "-[1]"]
    assert items[1].image.tobytes() == data[48:]
    assert items[1].image.shape == (4, 4, 3)


def test_a_truncated_last_frame_is_an_error_after_the_whole_ones() -> None:
    """What came whole is delivered; what is missing is counted."""
    stream = sources(["-"], GREY, stdin=io.BytesIO(bytes(16 + 7)))
    assert next(stream).image.shape == (4, 4)
    with pytest.raises(InputError, match=r"frame 1 .* truncated: 7 bytes of 16"):
        next(stream)
