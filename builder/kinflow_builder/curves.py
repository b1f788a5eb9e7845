"""Accuracy over bytes when every image is sent: the family's features at each codec, and image files as baselines."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from kinflow.family import Family
from kinflow.preprocess import Preprocessor
from kinflow_builder.bdrate import Point
from kinflow_builder.folders import Pictures, Pixels
from kinflow_builder.measure import Array, Labels

ImageKind = Literal["JPEG", "WEBP"]

# By side, relative to the family's input: a smaller picture of fair quality often beats a full one of poor quality.
QUALITIES = {
    1.0: (1, 5, 10, 20, 35, 50, 75, 90, 100),
    0.75: (5, 20, 50, 75, 90),
    0.5: (5, 20, 50, 75, 90),
}
LOSSLESS_EFFORT = 80
SAMPLE_SEED = 0


@dataclass(frozen=True)
class FeaturePoint(Point):
    """The device's features with one codec, continued by the largest member."""

    codec: str


@dataclass(frozen=True)
class ImagePoint(Point):
    """Image files, each with its header as it is sent, to the largest member."""

    quality: int
    height: int
    width: int
    lossless: bool
    """A WebP that is exactly the picture; the quality is then how hard it was tried."""


def sample(total: int, count: int | None) -> npt.NDArray[np.intp]:
    """Indices of `count` of `total` images, at random but always the same; all where `count` is None or more."""
    order = np.random.default_rng(SAMPLE_SEED).permutation(total)
    return np.sort(order[:count])


def feature_curve(family: Family, pictures: Pictures, threads: int = 2) -> list[FeaturePoint]:
    """A point per codec of the split at which the smallest member ends; none where nothing continues from there."""
    names = list(family.manifest.members)
    device = family.member(names[0], threads=threads)
    split = device.segments[-1].split
    if split is None or len(names) < 2:
        return []
    largest = family.member(names[-1], source=split, threads=threads)
    codecs = {name: family.codec(split, name) for name in family.manifest.splits[split].codecs}
    tallies = {name: _Tally() for name in codecs}
    for images, labels in pictures.labelled(family.preprocess):
        features = device.run(_prepared(family, images)).features
        assert features is not None  # it ends at a split
        for name, codec in codecs.items():
            coded = [codec.encode(item) for item in features]
            decoded = np.stack([codec.decode(data) for data in coded])
            tallies[name].add(coded, largest.run(decoded).logits, labels)
    return [FeaturePoint(*tally.point(), name) for name, tally in tallies.items()]


def image_curve(family: Family, pictures: Pictures, kind: ImageKind, threads: int = 2) -> list[ImagePoint]:
    """A point per quality and size; a smaller picture is scaled up again for the largest member."""
    largest = family.member(list(family.manifest.members)[-1], threads=threads)
    mode, plane = family.preprocess.mode, (family.preprocess.height, family.preprocess.width)
    settings = [
        (quality, max(1, round(plane[0] * scale)), max(1, round(plane[1] * scale)), False)
        for scale, qualities in QUALITIES.items()
        for quality in qualities
    ]
    if kind == "WEBP":
        settings.append((LOSSLESS_EFFORT, *plane, True))
    tallies = {setting: _Tally() for setting in settings}
    for images, labels in pictures.labelled(family.preprocess):
        for (quality, height, width, lossless), tally in tallies.items():
            options = {"lossless": True} if lossless else {}
            files = [encode(scaled(image, height, width), kind, quality=quality, **options) for image in images]
            seen = [scaled(decode(file, mode), *plane) for file in files]
            tally.add(files, largest.run(_prepared(family, seen)).logits, labels)
    return [
        ImagePoint(*tally.point(), quality, height, width, lossless)
        for (quality, height, width, lossless), tally in tallies.items()
    ]


def encode(image: Pixels, kind: str, **options: int) -> bytes:
    """The bytes of an image file, as Pillow writes it; a JPEG with tables of its own, which makes it smaller."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **({"optimize": True} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def decode(raw: bytes, mode: str) -> Pixels:
    """uint8 [height, width] for mode L, [height, width, 3] for RGB."""
    return np.asarray(Image.open(io.BytesIO(raw)).convert(mode), np.uint8)


def scaled(image: Pixels, height: int, width: int) -> Pixels:
    """The same picture in another size."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.uint8)


def _prepared(family: Family, images: Iterable[Pixels]) -> Array:
    prepare = Preprocessor(family.preprocess)
    return np.concatenate([prepare(image) for image in images])


@dataclass
class _Tally:
    """Sizes and right answers so far."""

    sizes: list[int] = field(default_factory=list)
    right: int = 0

    def add(self, coded: list[bytes], logits: Array, labels: Labels) -> None:
        self.sizes += map(len, coded)
        self.right += int((logits.argmax(1) == labels).sum())

    def point(self) -> tuple[float, float]:
        """(mean bytes, top-1)"""
        return float(np.mean(self.sizes)), self.right / len(self.sizes)
