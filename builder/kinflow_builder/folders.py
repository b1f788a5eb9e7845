"""A folder -> its pictures and their labels: class folders, an idx pair, or names that begin with the class's index.

Nothing is decoded before it is asked for: a folder may be larger than the memory. Needs no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow import idx
from kinflow.errors import InputError
from kinflow.images import SUFFIXES, labels_beside, read_image
from kinflow.manifest import Preprocess
from kinflow.preprocess import Preprocessor
from kinflow_builder.classes import INDEX, match

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Part = Literal["train", "test"]

BATCH = 100
PART_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
PART_PREFIXES: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("t10k", "test", "val")}
UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures that are read when they are asked for. Made by `find` or `divide`."""

    items: Sequence[Path] | Pixels
    """Files, or uint8 [n, height, width] or [n, height, width, 3]."""
    labels: Labels | None
    """int64 [n], each an index into `classes`; None where the folder does not tell them."""
    classes: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def part(self, chosen: npt.NDArray[np.intp]) -> Pictures:
        """Those with the indices `chosen`."""
        items = self.items[chosen] if isinstance(self.items, np.ndarray) else [self.items[i] for i in chosen]
        return Pictures(items, None if self.labels is None else self.labels[chosen], self.classes)

    def spread(self, count: int) -> Pictures:
        """At most `count`: evenly over all, for files come class by class, and in random order."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.intp)
        return self.part(np.random.default_rng(0).permutation(chosen))

    def image(self, index: int, preprocess: Preprocess) -> Pixels:
        """uint8 [height, width] for mode L, [height, width, 3] for RGB. Raises InputError that names the file."""
        item = self.items[index]
        if isinstance(item, Path):
            return read_image(item, preprocess)
        plane = (preprocess.height, preprocess.width)
        expected = (*plane, 3) if preprocess.mode == "RGB" else plane
        if item.shape != expected:
            raise InputError(f"the idx file holds images of {item.shape}, this family takes {expected}")
        return np.asarray(item, np.uint8)

    def read(self, preprocess: Preprocess) -> Iterator[tuple[Pixels, int | None]]:
        """(image as from `image`, its label or None), one after the other."""
        for index in range(len(self)):
            yield self.image(index, preprocess), None if self.labels is None else int(self.labels[index])

    def labelled(self, preprocess: Preprocess, size: int = BATCH) -> Iterator[tuple[list[Pixels], Labels]]:
        """At most `size` images at a time, and their labels."""
        for begin in range(0, len(self), size):
            indices = range(begin, min(begin + size, len(self)))
            yield [self.image(index, preprocess) for index in indices], self.truth[begin : begin + size]

    def batches(self, preprocess: Preprocess, size: int = BATCH) -> Iterator[npt.NDArray[np.float32]]:
        """float32 [at most `size`, channels, height, width], preprocessed as a device does it."""
        prepare = Preprocessor(preprocess)
        for begin in range(0, len(self), size):
            indices = range(begin, min(begin + size, len(self)))
            yield np.concatenate([prepare(self.image(index, preprocess)) for index in indices])

    @property
    def truth(self) -> Labels:
        """The labels. Raises InputError where there are none."""
        if self.labels is None:
            raise InputError("these pictures have no labels, and accuracy needs them")
        return self.labels

    def sha256(self) -> str:
        """Of the files' content (an idx file's: the pixels) and the labels. Names and order do not matter."""
        labels = np.full(len(self), UNLABELLED) if self.labels is None else self.labels
        parts = sorted(
            hashlib.sha256(item.read_bytes() if isinstance(item, Path) else item.tobytes()).digest()
            + int(label).to_bytes(4, "little", signed=True)
            for item, label in zip(self.items, labels, strict=True)
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()


class Division(NamedTuple):
    """What a model is trained on, calibrated with and measured on. No picture is in two of them."""

    train: Pictures
    held_out: Pictures
    """For temperatures and certificates: never trained on."""
    test: Pictures


def find(directory: Path, classes: Sequence[str] = (), *, part: Part = "test", labelled: bool = True) -> Pictures:
    """The pictures of `directory`, of its part `part` where it has parts (`train/` and `test/`, or two idx pairs).

    `classes`: the family's labels, which the folder's classes must fit; without them the folder's own are taken,
    sorted. `labelled=False` takes any pictures, also in sub-folders, and looks for no labels.
    Raises InputError that names the folder, what was found and what was expected.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder: expected one with pictures")
    pair = _idx_images(directory, part)
    if pair is not None:
        return _from_idx(pair, classes, labelled)
    root = _part_folder(directory, part)
    if not labelled:
        return Pictures(_need(root, _pictures(root, deep=True)), None, list(classes))
    folders = [folder for folder in _visible(root) if folder.is_dir() and _pictures(folder, deep=True)]
    flat = _pictures(root, deep=False)
    if folders and flat:
        raise InputError(
            f"{root} holds {len(folders)} folders with pictures and {len(flat)} pictures beside them: "
            "expected a folder per class, or flat files, not both"
        )
    return _from_class_folders(root, folders, classes) if folders else _from_flat_files(root, flat, classes)


def divide(
    directory: Path, classes: Sequence[str] = (), *, held_out: float = 0.1, test: float = 0.2, seed: int = 0
) -> Division:
    """Three parts of `directory`. `held_out` and `test` are shares of what they are taken from.

    Its own test part is left as it is; where it has none, the share `test` of all pictures makes one. Then the
    share `held_out` of the others is kept aside. Every class is divided alike. The same seed and the same files
    give the same parts. Raises as `find`, and InputError for a single class, and where a part would be empty.
    """
    train = find(directory, classes, part="train")
    if len(train.classes) < 2:
        raise InputError(
            f"{directory} has the class {train.classes[0]!r} alone: expected a folder for each of two or more"
        )
    least = math.ceil(1 / held_out)
    if _has_part(directory, "test"):
        tested = find(directory, train.classes, part="test")
        where = " to train on"
    else:
        least, where = math.ceil(least / (1 - test)), ""
        tested, train = _split(train, test, seed)
    kept, train = _split(train, held_out, seed + 1)
    for name, pictures in (("train", train), ("held-out", kept), ("test", tested)):
        if not len(pictures):
            raise InputError(
                f"{directory} has too few pictures: none is left for the {name} part, {least}{where} are the least"
            )
    return Division(train, kept, tested)


def _split(pictures: Pictures, share: float, seed: int) -> tuple[Pictures, Pictures]:
    """(the share, the rest), evenly over the classes."""
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(pictures))
    ordered = shuffled[np.argsort(pictures.truth[shuffled], kind="stable")]
    # Every 1/share-th of the pictures in the classes' order, from a random one on.
    marks = np.floor(random.uniform() + share * np.arange(len(pictures) + 1))
    chosen = np.diff(marks) > 0
    return pictures.part(np.sort(ordered[chosen])), pictures.part(np.sort(ordered[~chosen]))


def _has_part(directory: Path, part: Part) -> bool:
    if any((directory / name).is_dir() for name in PART_FOLDERS[part]):
        return True
    return any(file.name.startswith(PART_PREFIXES[part]) for file in _idx_files(directory))


def _part_folder(directory: Path, part: Part) -> Path:
    names = [name for options in PART_FOLDERS.values() for name in options]
    there = [name for name in names if (directory / name).is_dir()]
    for name in PART_FOLDERS[part]:
        if name in there:
            return directory / name
    if there:
        raise InputError(f"{directory} has {', '.join(there)}/, expected {' or '.join(PART_FOLDERS[part])}/ too")
    return directory


def _visible(folder: Path) -> list[Path]:
    """Sorted by name, without hidden files: file managers and notebooks leave such behind."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(folder: Path, *, deep: bool) -> list[Path]:
    found = []
    for path in _visible(folder):
        if path.is_dir():
            found += _pictures(path, deep=True) if deep else []
        elif path.suffix.lower() in SUFFIXES:
            found.append(path)
    return found


def _need(root: Path, files: list[Path]) -> list[Path]:
    if not files:
        raise InputError(
            f"{root} holds no picture ({', '.join(sorted(SUFFIXES))}) and no idx pair: expected <class>/*.jpg, "
            "images-idx3-ubyte.gz with labels-idx1-ubyte.gz, or files such as 007_name.jpg"
        )
    return files


def _from_class_folders(root: Path, folders: list[Path], classes: Sequence[str]) -> Pictures:
    names = [folder.name for folder in folders]
    indices = match(names, classes, root) if classes else list(range(len(names)))
    files, labels = [], []
    for folder, index in zip(folders, indices, strict=True):
        inside = _pictures(folder, deep=True)
        files += inside
        labels += [index] * len(inside)
    return Pictures(files, np.asarray(labels, np.int64), list(classes) or names)


def _from_flat_files(root: Path, files: list[Path], classes: Sequence[str]) -> Pictures:
    indices = []
    for file in _need(root, files):
        found = INDEX.fullmatch(file.stem)
        if found is None:
            raise InputError(f"{file}: expected a name that begins with the class's index, such as 007_name.jpg")
        indices.append(int(found[1]))
    if not classes:
        present = sorted(set(indices))
        return Pictures(files, np.searchsorted(present, indices).astype(np.int64), [str(index) for index in present])
    for file, index in zip(files, indices, strict=True):
        if index >= len(classes):
            raise InputError(f"{file}: begins with the index {index}, the family's labels are 0 to {len(classes) - 1}")
    return Pictures(files, np.asarray(indices, np.int64), list(classes))


def _idx_files(directory: Path) -> list[Path]:
    return [file for file in _visible(directory) if file.is_file() and re.search(r"images.idx[34]", file.name)]


def _idx_images(directory: Path, part: Part) -> Path | None:
    """The images' idx file; one that is alone serves as any part."""
    files = _idx_files(directory)
    wanted = [file for file in files if file.name.startswith(PART_PREFIXES[part])] or files
    if len({file.name.removesuffix(".gz") for file in wanted}) > 1:
        raise InputError(
            f"{directory} holds {', '.join(file.name for file in files)}: expected one idx pair, or one whose name "
            f"begins with {' or '.join(PART_PREFIXES[part])}"
        )
    return wanted[0] if wanted else None


def _from_idx(images_path: Path, classes: Sequence[str], labelled: bool) -> Pictures:
    images = idx.read(images_path)
    if not labelled:
        return Pictures(images, None, list(classes))
    labels_path = labels_beside(images_path)
    if labels_path is None:
        raise InputError(f"{images_path} has no labels beside it: expected an idx1 file of the same name")
    labels = idx.read(labels_path, 1).astype(np.int64)
    if len(labels) != len(images) or not len(labels):
        raise InputError(f"{labels_path} holds {len(labels)} labels for the {len(images)} images of {images_path}")
    if classes and labels.max() >= len(classes):
        raise InputError(f"{labels_path} has the label {labels.max()}, the family's are 0 to {len(classes) - 1}")
    return Pictures(images, labels, list(classes) or [str(index) for index in range(int(labels.max()) + 1)])
