"""Image files, idx files and raw frames -> arrays of the size a family takes. Files are read with Pillow."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from kinflow import idx
from kinflow.errors import InputError, SettingsError
from kinflow.manifest import Preprocess

Pixels = npt.NDArray[np.uint8]

STDIN = "-"
MAX_PIXELS = 64_000_000
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Item:
    """One image on its way to `Device.infer`."""

    name: str
    image: Pixels
    """uint8 [height, width] for mode L, [height, width, 3] for RGB."""
    truth: int | None = None
    """The label's index, where the source knows it."""


def read_image(source: str | Path | bytes, preprocess: Preprocess) -> Pixels:
    """A picture's file, or its bytes, decoded, turned as its EXIF says and fitted to the family's size.

    uint8 [height, width] for mode L, [height, width, 3] for RGB. `preprocess.resize` decides how another size
    is fitted: "stretch", or "crop": the shorter side is scaled and the centre cut out. Transparency becomes
    black.
    Raises InputError that names the file, and SettingsError where Pillow is missing.
    """
    if find_spec("PIL") is None:
        raise SettingsError("reading image files needs Pillow: pip install 'kinflow[cli]'")
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    data = _read(name, source)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                size = f"{opened.width}x{opened.height}"
                raise InputError(f"{name} is {size}, images of at most {MAX_PIXELS} pixels are read")
            image = fit(ImageOps.exif_transpose(opened), preprocess)
    except UnidentifiedImageError as exc:
        raise InputError(f"{name} is not an image that Pillow can read") from exc
    except Image.DecompressionBombError as exc:
        raise InputError(f"{name} is too large: images of at most {MAX_PIXELS} pixels are read") from exc
    except (OSError, SyntaxError, ValueError, EOFError) as exc:  # what Pillow's decoders raise on damage
        raise InputError(f"{name} is damaged or truncated: {exc}") from exc
    return image


def fit(image: Any, preprocess: Preprocess) -> Pixels:
    """A PIL image, or uint8 [height, width, 3] of RGB, in the family's mode and size: see `read_image`."""
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = _to_mode(image, preprocess.mode)
    fitted = (preprocess.width, preprocess.height)
    if image.size != fitted:
        if preprocess.resize == "crop":
            image = ImageOps.fit(image, fitted, Image.Resampling.BILINEAR)
        else:
            image = image.resize(fitted, Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def sources(
    paths: Sequence[str | Path],
    preprocess: Preprocess,
    *,
    stdin: IO[bytes] | None = None,
) -> Iterator[Item]:
    """The images of files, folders (sorted by name, their sub-folders too), idx files, and `-`.

    `-` reads raw uint8 frames of height*width*channels bytes from `stdin` until it ends. An idx file of
    images has truth when the idx file of its labels lies beside it. Raises InputError that names the source,
    when the source is reached: the images before it are delivered.
    """
    for path in paths:
        if str(path) == STDIN:
            yield from frames(stdin or sys.stdin.buffer, preprocess)
            continue
        path = Path(path)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not files:
                raise InputError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))})")
            for file in files:
                yield Item(str(file), read_image(file, preprocess))
        elif _is_idx(path):
            yield from _idx(path, preprocess)
        else:
            yield Item(str(path), read_image(path, preprocess))


def labels_beside(images: Path) -> Path | None:
    """The labels' idx file for an images' one, where it is there: train-images-idx3… -> train-labels-idx1…"""
    name = images.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    if name == images.name:
        return None
    stem = name.removesuffix(".gz")
    files = (images.with_name(stem), images.with_name(f"{stem}.gz"))
    return next((file for file in files if file.is_file()), None)


def _read(name: str, source: str | Path | bytes) -> bytes:
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except OSError as exc:
            raise InputError(f"{name}: {exc.strerror}") from exc
    if not source:
        raise InputError(f"{name} is empty: an image was expected")
    return source


def _to_mode(image: Any, mode: str) -> Any:
    """8-bit L or RGB. 16-bit greyscale is scaled down: Pillow's own conversion would clip it at 255."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats without a known range")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def _is_idx(path: Path) -> bool:
    """By content: no picture is gzipped or begins with two zero bytes and the code of unsigned bytes."""
    try:
        with path.open("rb") as stream:
            head = stream.read(3)
    except OSError:
        return False  # reading the image will say why
    return head[:2] == b"\x1f\x8b" or head == bytes((0, 0, idx.UNSIGNED_BYTE))


def _idx(path: Path, preprocess: Preprocess) -> Iterator[Item]:
    images = idx.read(path)
    shape = _shape(preprocess)
    if images.shape[1:] != shape:
        raise InputError(f"{path} holds images of {images.shape[1:]}, this family takes {shape}")
    labels_path = labels_beside(path)
    labels = None if labels_path is None else idx.read(labels_path, 1)
    if labels is not None and labels.shape != images.shape[:1]:
        raise InputError(f"{labels_path} holds {len(labels)} labels for the {len(images)} images of {path}")
    for index, image in enumerate(images):
        yield Item(f"{path.name}[{index}]", image, None if labels is None else int(labels[index]))


def frames(stream: IO[bytes], preprocess: Preprocess) -> Iterator[Item]:
    """Raw uint8 frames in the family's mode and size until the stream ends. InputError for half a frame."""
    shape = _shape(preprocess)
    size = int(np.prod(shape))
    index = 0
    while frame := _exactly(stream, size):
        if len(frame) < size:
            got = f"{len(frame)} bytes of {size}"
            raise InputError(f"frame {index} on standard input is truncated: {got} (uint8 {shape})")
        yield Item(f"-[{index}]", np.frombuffer(frame, np.uint8).reshape(shape))
        index += 1


def _exactly(stream: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end: a pipe gives what it has."""
    parts = bytearray()
    while len(parts) < size and (part := stream.read(size - len(parts))):
        parts += part
    return bytes(parts)


def _shape(preprocess: Preprocess) -> tuple[int, ...]:
    plane = (preprocess.height, preprocess.width)
    return (*plane, 3) if preprocess.mode == "RGB" else plane
