"""A head that costs a draft little: it rates all tokens roughly, and the likeliest of them exactly.

Hidden values at an exit lie near a plane of few dimensions. On it all tokens are rated, which takes a third of the
products, in 4 bits; then the best ones by their own rows of the head (Shim et al., "SVD-softmax", NIPS 2017, who find
the plane in the head alone; here it is the one that leaves least of the logits out on the exit's own hidden values).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kinflow_builder.text.blocks import BLOCK
from kinflow_builder.text.shape import Floats

# Dimensions of the plane.
RANK = 192
# Tokens that are rated exactly.
TOKENS = 128
# Of a channel's mean variance, added to all: directions that the texts did not show are not free.
RIDGE = 1e-2


@dataclass(frozen=True)
class Sketch:
    """hidden is near centre + up (down (hidden - centre))."""

    centre: Floats
    """[width]"""
    down: Floats
    """[rank, width]"""
    up: Floats
    """[width, rank]"""


def fit(hidden: Floats, head: Floats) -> Sketch:
    """Of an exit's normed hidden values [n, width]; head [vocabulary, width].

    With C their covariance and W the head, its rows less their mean, the best plane for W (hidden - centre) is spanned
    by the right singular vectors of W √C.
    """
    centre = hidden.mean(0, dtype=np.float64)
    covariance = np.cov(hidden, rowvar=False, dtype=np.float64)
    covariance += RIDGE * covariance.diagonal().mean() * np.eye(len(covariance))
    sizes, axes = np.linalg.eigh(covariance)
    root, inverse = ((axes * sizes**power) @ axes.T for power in (0.5, -0.5))
    # What is the same for all tokens changes no choice.
    rows = head - head.mean(0, dtype=np.float64)
    found, vectors = np.linalg.eigh(root @ (rows.T @ rows) @ root)
    rank = max(BLOCK, min(RANK, len(centre) // 2 // BLOCK * BLOCK))
    plane = vectors[:, np.argsort(found)[::-1][:rank]]
    return Sketch(*(np.asarray(part, np.float32) for part in (centre, plane.T @ inverse, root @ plane)))
