"""Writes the idx files in data/ from scikit-learn's copy of the digits: `pip install scikit-learn`, then run this.

The copy holds 1,797 images of 8x8 pixels with values from 0 to 16; they are stored as min(16 × value, 255). Which
images are for training and which for testing is drawn once, here.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from kinflow import idx

TEST_IMAGES = 397
FOLDER = Path(__file__).parent / "data"

digits = load_digits()
images = np.minimum(digits.images * 16, 255).astype(np.uint8)
labels = digits.target.astype(np.uint8)
order = np.random.default_rng(0).permutation(len(labels))
for part, chosen in (("test", np.sort(order[:TEST_IMAGES])), ("train", np.sort(order[TEST_IMAGES:]))):
    idx.write(FOLDER / f"{part}-images-idx3-ubyte.gz", images[chosen])
    idx.write(FOLDER / f"{part}-labels-idx1-ubyte.gz", labels[chosen])
