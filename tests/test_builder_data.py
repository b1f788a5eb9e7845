"""Where images come from, and that only the recipe's own pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import numpy as np
import pytest

from kinflow import idx
from kinflow.errors import InputError
from kinflow_builder import data
from kinflow_builder.recipe import DataFile, IdxData, Recipe

FASHION = Path(__file__).parents[1] / "families" / "fashion"
COUNTS = {"train": 40, "t10k": 10}


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and keeps standard error for pytest."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set in the format and with the names of the real one."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in COUNTS.items():
        pixels = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        idx.write(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        idx.write(folder / f"{part}-labels-idx1-ubyte.gz", random.integers(0, 10, count).astype(np.uint8))
    return folder


def recipe_for(folder: Path, **changes: object) -> Recipe:
    """The fashion recipe with the digests of the files in `folder` and nowhere to look but --data."""

    def file(name: str) -> DataFile:
        raw = idx.content((folder / name).read_bytes(), name)
        return DataFile(name, hashlib.sha256(raw).hexdigest())

    recipe = Recipe.load(FASHION)
    spec = IdxData(
        source="made up",
        license="MIT",
        url="http://127.0.0.1:1/",
        directories=[],
        train_images=file("train-images-idx3-ubyte.gz"),
        train_labels=file("train-labels-idx1-ubyte.gz"),
        test_images=file("t10k-images-idx3-ubyte.gz"),
        test_labels=file("t10k-labels-idx1-ubyte.gz"),
        held_out=10,
        samples=5,
    )
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(spec, **changes))


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The folder over HTTP on loopback."""
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def test_named_folder(folder: Path, tmp_path: Path) -> None:
    """--data is read; the held-out images are other ones than those to train on, and together they are all."""
    found = data.load(recipe_for(folder), FASHION, folder, tmp_path / "cache")
    assert (len(found.train), len(found.held_out), len(found.test)) == (30, 10, 10)
    every = {image.tobytes() for part in (found.train, found.held_out) for image in part.items}
    assert every == {image.tobytes() for image in idx.read(folder / "train-images-idx3-ubyte.gz")}
    again = data.load(recipe_for(folder), FASHION, folder, tmp_path / "cache")
    assert again.held_out.sha256() == found.held_out.sha256()


def test_plain_files_pass(folder: Path, tmp_path: Path) -> None:
    """Files without gzip are the same images."""
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(idx.content(path.read_bytes(), path))
    recipe = recipe_for(folder)
    for path in folder.glob("*.gz"):
        path.unlink()
    assert len(data.load(recipe, FASHION, folder, tmp_path / "cache").test) == 10


def test_recipe_directories_come_before_a_download(folder: Path, tmp_path: Path) -> None:
    """Without --data the recipe's own folders are read; the address in it leads nowhere here."""
    found = data.load(recipe_for(folder, directories=[str(folder)]), FASHION, None, tmp_path / "cache")
    assert len(found.test) == 10


def test_download_is_checked_and_cached(folder: Path, tmp_path: Path, server: str) -> None:
    """What is downloaded once is found in the cache later, when the server is gone."""
    cache = tmp_path / "cache"
    first = data.load(recipe_for(folder, url=server), FASHION, None, cache)
    second = data.load(recipe_for(folder), FASHION, None, cache)
    assert first.test.sha256() == second.test.sha256()
    assert {path.suffix for path in cache.iterdir()} == {".gz"}


def test_another_file_behind_the_address(folder: Path, tmp_path: Path, server: str) -> None:
    """A download with another content is refused and leaves nothing in the cache."""
    recipe = recipe_for(folder, url=server)
    idx.write(folder / "train-images-idx3-ubyte.gz", np.zeros((40, 28, 28), np.uint8))
    with pytest.raises(InputError, match="expected content with sha256"):
        data.load(recipe, FASHION, None, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_nothing_anywhere(folder: Path, tmp_path: Path) -> None:
    """No file and no network: the error names the file, the address and the way out."""
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is not here.*--data DIR"):
        data.load(recipe_for(folder), FASHION, None, tmp_path / "cache")


def test_foreign_file(folder: Path, tmp_path: Path) -> None:
    """Other images under the right name are refused."""
    recipe = recipe_for(folder)
    idx.write(folder / "t10k-images-idx3-ubyte.gz", np.zeros((10, 28, 28), np.uint8))
    with pytest.raises(InputError, match="t10k-images"):
        data.load(recipe, FASHION, folder, tmp_path / "cache")


def test_folder_without_the_files(folder: Path, tmp_path: Path) -> None:
    """An empty --data is an error, never a silent download."""
    with pytest.raises(InputError, match=r"neither train-images-idx3-ubyte\.gz nor train-images-idx3-ubyte"):
        data.load(recipe_for(folder), FASHION, tmp_path, tmp_path / "cache")


def test_too_many_held_out(folder: Path, tmp_path: Path) -> None:
    """Keeping everything aside would leave nothing to train on."""
    with pytest.raises(InputError, match="held_out is 40"):
        data.load(recipe_for(folder, held_out=40), FASHION, folder, tmp_path / "cache")


def test_test_images_alone(folder: Path) -> None:
    """The benchmark's way in reads images and labels by the recipe's folder, and checks them too."""
    text = (FASHION / "recipe.toml").read_text()
    committed, made = Recipe.load(FASHION).data, recipe_for(folder).data
    text = text.replace(committed.test_images.sha256, made.test_images.sha256)
    (folder / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match="t10k-labels"):
        data.load_test(folder, folder)
    (folder / "recipe.toml").write_text(text.replace(committed.test_labels.sha256, made.test_labels.sha256))
    test = data.load_test(folder, folder)
    assert np.shape(test.items) == (10, 28, 28)
    assert test.truth.dtype == np.int64
