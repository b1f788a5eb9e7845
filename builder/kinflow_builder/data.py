"""Finds a family's images: in a folder that is named, where the recipe says, in a cache, or downloads them.

Every idx file is checked against the recipe's sha256, wherever it comes from. Needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kinflow import idx
from kinflow.errors import InputError
from kinflow_builder import folders, stitch_recipe
from kinflow_builder.folders import Division, Pictures
from kinflow_builder.recipe import DataFile, FolderData, IdxData
from kinflow_builder.stitch_recipe import AnyRecipe

DOWNLOAD_TIMEOUT_S = 60.0
MAX_DOWNLOAD_BYTES = 1 << 28


def load(recipe: AnyRecipe, folder: Path, directory: Path | None = None, cache: Path | None = None) -> Division:
    """What the recipe in `folder` trains on, calibrates with and is measured on, divided by the recipe's seed.

    idx files are looked for in `directory` if it is given, else where the recipe says and in `cache`, else
    downloaded into that; pictures in `directory`, else where the recipe says.
    Raises InputError when a file is missing or not the one that the recipe names.
    """
    data, seed = recipe.data, recipe.training.seed
    if isinstance(data, FolderData):
        root = directory or folder / data.directory
        return folders.divide(root, recipe.labels, held_out=data.held_out, test=data.test, seed=seed)
    train = _pair(recipe, data.train_images, data.train_labels, folder, directory, cache)
    test = _pair(recipe, data.test_images, data.test_labels, folder, directory, cache)
    count = len(train)
    if data.held_out >= count:
        raise InputError(f"data.held_out is {data.held_out}, there are only {count} training images")
    order = np.random.default_rng(seed).permutation(count)
    held_out, rest = np.sort(order[: data.held_out]), np.sort(order[data.held_out :])
    return Division(train.part(rest), train.part(held_out), test)


def load_test(folder: Path, directory: Path | None = None, cache: Path | None = None) -> Pictures:
    """The test images of the family whose recipe is in `folder`. Raises as `load` and `Recipe.load` do."""
    recipe = stitch_recipe.load(folder)
    if isinstance(recipe.data, FolderData):
        return load(recipe, folder, directory, cache).test
    return _pair(recipe, recipe.data.test_images, recipe.data.test_labels, folder, directory, cache)


def cache_folder() -> Path:
    """Where downloads are kept: kinflow/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kinflow"


def _pair(
    recipe: AnyRecipe, images: DataFile, labels: DataFile, folder: Path, directory: Path | None, cache: Path | None
) -> Pictures:
    assert isinstance(recipe.data, IdxData)  # load: the other kind has no files
    places = [folder / place for place in recipe.data.directories]
    pixels = _read(recipe.data, images, 3, places, directory, cache or cache_folder())
    classes = _read(recipe.data, labels, 1, places, directory, cache or cache_folder())
    if len(pixels) != len(classes):
        raise InputError(f"{images.name} has {len(pixels)} images, {labels.name} has {len(classes)} labels")
    return Pictures(pixels, classes.astype(np.int64), recipe.labels)


def _read(
    data: IdxData, file: DataFile, axes: int, places: list[Path], directory: Path | None, cache: Path
) -> npt.NDArray[np.uint8]:
    path = _find(data, file, places, directory, cache)
    raw = idx.content(path.read_bytes(), path)
    found = hashlib.sha256(raw).hexdigest()
    if found != file.sha256:
        raise InputError(f"{path}: expected content with sha256 {file.sha256[:12]}…, found {found[:12]}…")
    return idx.parse(raw, path, axes)


def _find(data: IdxData, file: DataFile, places: list[Path], directory: Path | None, cache: Path) -> Path:
    if directory is not None:
        path = _in(directory, file.name)
        if path is None:
            raise InputError(f"{directory} has neither {file.name} nor {file.name.removesuffix('.gz')}")
        return path
    for folder in (*places, cache):
        path = _in(folder, file.name)
        if path is not None:
            return path
    return _download(data, file, cache)


def _in(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / name.removesuffix(".gz")):
        if path.is_file():
            return path
    return None


def _download(data: IdxData, file: DataFile, cache: Path) -> Path:
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
