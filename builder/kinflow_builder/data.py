"""Finds a family's images: in a folder that is named, where the recipe says, in a cache, or downloads them.

Every file is checked against the recipe's sha256, wherever it comes from. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow import idx
from kinflow.errors import InputError
from kinflow.manifest import Preprocess
from kinflow.preprocess import Preprocessor
from kinflow_builder.recipe import Data, DataFile, Recipe

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

DOWNLOAD_TIMEOUT_S = 60.0
MAX_DOWNLOAD_BYTES = 1 << 28


class LabelledImages(NamedTuple):
    """Images uint8 [n, height, width] and their labels' indices int64 [n]."""

    images: Images
    labels: Labels

    def part(self, chosen: npt.NDArray[np.intp] | slice) -> LabelledImages:
        return LabelledImages(self.images[chosen], self.labels[chosen])

    def sha256(self) -> str:
        """Of the pixels, then the labels as little-endian int64."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DataSet:
    """What the recipe trains on, calibrates with and is measured on."""

    train: LabelledImages
    held_out: LabelledImages
    """For temperature and certificate: never trained on."""
    test: LabelledImages


def load(recipe: Recipe, directory: Path | None = None, cache: Path | None = None) -> DataSet:
    """Both parts, the training images split by the recipe's seed.

    Looks in `directory` if it is given, else where the recipe says and in `cache`, else downloads into that.
    Raises InputError when a file is missing or not the one that the recipe names.
    """
    data = recipe.data
    train = _pair(data, data.train_images, data.train_labels, directory, cache)
    test = _pair(data, data.test_images, data.test_labels, directory, cache)
    count = len(train.labels)
    if data.held_out >= count:
        raise InputError(f"data.held_out is {data.held_out}, there are only {count} training images")
    order = np.random.default_rng(recipe.training.seed).permutation(count)
    held_out, rest = np.sort(order[: data.held_out]), np.sort(order[data.held_out :])
    return DataSet(train.part(rest), train.part(held_out), test)


def load_test(folder: Path, directory: Path | None = None, cache: Path | None = None) -> LabelledImages:
    """The test images of the family whose recipe is in `folder`. Raises as `load` and `Recipe.load` do."""
    data = Recipe.load(folder).data
    return _pair(data, data.test_images, data.test_labels, directory, cache)


def preprocess(images: Images, spec: Preprocess) -> npt.NDArray[np.float32]:
    """uint8 [n, height, width] -> float32 [n, channels, height, width], as a device does it."""
    prepare = Preprocessor(spec)
    return np.concatenate([prepare(image) for image in images])


def cache_folder() -> Path:
    """Where downloads are kept: kinflow/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kinflow"


def _pair(data: Data, images: DataFile, labels: DataFile, directory: Path | None, cache: Path | None) -> LabelledImages:
    cache = cache or cache_folder()
    pixels = _read(data, images, 3, directory, cache)
    classes = _read(data, labels, 1, directory, cache)
    if len(pixels) != len(classes):
        raise InputError(f"{images.name} has {len(pixels)} images, {labels.name} has {len(classes)} labels")
    return LabelledImages(pixels, classes.astype(np.int64))


def _read(data: Data, file: DataFile, axes: int, directory: Path | None, cache: Path) -> Images:
    path = _find(data, file, directory, cache)
    raw = idx.content(path.read_bytes(), path)
    found = hashlib.sha256(raw).hexdigest()
    if found != file.sha256:
        raise InputError(f"{path}: expected content with sha256 {file.sha256[:12]}…, found {found[:12]}…")
    return idx.parse(raw, path, axes)


def _find(data: Data, file: DataFile, directory: Path | None, cache: Path) -> Path:
    if directory is not None:
        path = _in(directory, file.name)
        if path is None:
            raise InputError(f"{directory} has neither {file.name} nor {file.name.removesuffix('.gz')}")
        return path
    for folder in (*map(Path, data.directories), cache):
        path = _in(folder, file.name)
        if path is not None:
            return path
    return _download(data, file, cache)


def _in(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.is_file():
            return path
    return None


def _download(data: Data, file: DataFile, cache: Path) -> Path:
    """Into the cache, by way of a temporary file, so that a broken download leaves nothing behind."""
    address = data.url + file.name
    way_out = f"name a folder that has it (--data DIR), or put it into {cache}"
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT_S) as stream:
            raw: bytes = stream.read(MAX_DOWNLOAD_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as exc:
        raise InputError(f"{file.name} is not here and {address} cannot be fetched ({exc}): {way_out}") from exc
    if len(raw) > MAX_DOWNLOAD_BYTES:
        raise InputError(f"{address} has more than {MAX_DOWNLOAD_BYTES} bytes: {way_out}")
    found = hashlib.sha256(idx.content(raw, address)).hexdigest()
    if found != file.sha256:
        raise InputError(f"{address}: expected content with sha256 {file.sha256[:12]}…, found {found[:12]}…: {way_out}")
    cache.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=cache)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(raw)
        os.replace(temporary, cache / file.name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return cache / file.name
