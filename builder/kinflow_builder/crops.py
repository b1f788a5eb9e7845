"""Pictures as a network is trained on them: the centre as a device sees it, then random parts, some mirrored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from kinflow.manifest import Preprocess
from kinflow.preprocess import Preprocessor
from kinflow_builder.folders import Pictures

Pixels = npt.NDArray[np.uint8]

# Of a picture's area, and of width over height: what training on ImageNet usually takes.
AREA = (0.3, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10


def crops(pictures: Pictures, preprocess: Preprocess, each: int, seed: int) -> Pixels:
    """uint8 [pictures * (1 + each), height, width(, 3)]: all centres, then `each` rounds of random parts."""
    random = np.random.default_rng(seed)
    centres = [pictures.image(index, preprocess) for index in range(len(pictures))]
    parts = [_part(pictures.items[index], preprocess, random) for _ in range(each) for index in range(len(pictures))]
    return np.stack(centres + parts)


def preprocessed(images: Pixels, preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """float32 [n, channels, height, width], as a device makes them."""
    prepare = Preprocessor(preprocess)
    return np.concatenate([prepare(image) for image in images])


def _part(item: Path | Pixels, preprocess: Preprocess, random: np.random.Generator) -> Pixels:
    with Image.open(item) if isinstance(item, Path) else Image.fromarray(item) as opened:
        image = opened.convert(preprocess.mode)
    box = _box(image.width, image.height, random)
    part = image.resize((preprocess.width, preprocess.height), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part, np.uint8)


def _box(width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    for _ in range(TRIES):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and high <= height:
            left, top = random.uniform(0, width - wide), random.uniform(0, height - high)
            return left, top, left + wide, top + high
    return 0.0, 0.0, float(width), float(height)
