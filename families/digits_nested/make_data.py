"""Writes the idx files in data/ from the copy of the digits in a wheel of scikit-learn:

    pip download --no-deps scikit-learn
    python families/digits_nested/make_data.py scikit_learn-*.whl

It has 1,797 images of 8x8 pixels with values from 0 to 16; they are stored as min(16 × value, 255). Which of them
are for testing is drawn here, once.
"""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path

import numpy as np

from kinflow import idx

TEST_IMAGES = 397
FOLDER = Path(__file__).parent / "data"

with zipfile.ZipFile(sys.argv[1]) as wheel:
    lines = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode().splitlines()
rows = np.loadtxt(lines, delimiter=",", dtype=np.int64)
images = np.minimum(rows[:, :-1] * 16, 255).astype(np.uint8).reshape(-1, 8, 8)
labels = rows[:, -1].astype(np.uint8)
order = np.random.default_rng(0).permutation(len(labels))
FOLDER.mkdir(exist_ok=True)
for part, chosen in (("test", np.sort(order[:TEST_IMAGES])), ("train", np.sort(order[TEST_IMAGES:]))):
    idx.write(FOLDER / f"{part}-images-idx3-ubyte.gz", images[chosen])
    idx.write(FOLDER / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
