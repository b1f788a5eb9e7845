"""Matrices as onnxruntime's MatMulNBits stores them: blocks of neighbours in a row, each with a scale of its own.

In 4 bits where that loses nothing, in 8 bits otherwise. A matrix that was published in 4 bits has in each block at most
16 values at equal distances, from an offset on (GGUF's Q4_1: level × scale + offset). MatMulNBits knows no other
offsets than whole levels. What is left, half a level at most, times the sum of the block's inputs is one more product:
the inputs get their blocks' sums behind them, and the matrix what is left as columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow_builder.text.shape import Floats

# Values of a matrix' row that have a scale of their own.
BLOCK = 32
STEPS = 15
# Stands for 0.0 in the columns behind a matrix.
MIDDLE = 8
# How far from a level a value may be, as a share of their distance, and still be one that is only rounded.
ROUNDING = 0.01


class FourBits(NamedTuple):
    """matrix [rows, width], and behind it what is left of offsets, in blocks too."""

    levels: npt.NDArray[np.uint8]
    """[rows, blocks, BLOCK / 2], two in a byte, the first one in its low half."""
    scale: Floats
    """[rows, blocks]"""
    zero: npt.NDArray[np.uint8]
    """[rows, ceil(blocks / 2)]: the level that stands for 0.0, two in a byte as above."""


def eight_bits(matrix: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """matrix [rows, width] -> levels [rows, blocks, BLOCK] of -127…127 and scale [rows, blocks, 1]."""
    return _symmetric(matrix, 127)


def four_bits(matrix: Floats) -> FourBits | None:
    """None where a block has other values than 16 at equal distances."""
    rows, width = matrix.shape
    blocks = matrix.reshape(rows, -1, BLOCK)
    if any(len(np.unique(block)) > STEPS + 1 for block in blocks[0]):
        return None
    lowest = blocks.min(2, keepdims=True)
    step = np.zeros_like(lowest)
    for steps in range(STEPS, 0, -1):
        tried = np.where(step > 0, step, (blocks.max(2, keepdims=True) - lowest) / steps)
        place = (blocks - lowest) / np.where(tried > 0, tried, 1)
        fits = np.abs(place - np.rint(place)).max(2, keepdims=True) < ROUNDING
        step = np.where(fits, tried, step)
        if fits.all():
            break
    else:
        return None
    levels = np.rint((blocks - lowest) / np.where(step > 0, step, 1)).astype(np.uint8).reshape(rows, width)
    zero = np.rint(-lowest / np.where(step > 0, step, 1)).clip(0, STEPS)
    left = (lowest + zero * step)[:, :, 0]
    left_levels, left_scale = _symmetric(np.pad(left, ((0, 0), (0, -left.shape[1] % BLOCK))), MIDDLE - 1)
    behind = (left_levels.reshape(rows, -1) + MIDDLE).astype(np.uint8)
    zeros = np.concatenate([zero, np.full(left_scale.shape, MIDDLE)], 1)[:, :, 0].astype(np.uint8)
    return FourBits(
        _in_pairs(np.concatenate([levels, behind], 1)).reshape(rows, -1, BLOCK // 2),
        np.concatenate([step, left_scale], 1)[:, :, 0].astype(np.float32),
        _in_pairs(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))),
    )


def rough(matrix: Floats) -> FourBits:
    """Any matrix [rows, width], to half a level and without offsets."""
    levels, scale = _symmetric(matrix, MIDDLE - 1)
    stored = (levels.reshape(matrix.shape) + MIDDLE).astype(np.uint8)
    zero = np.full((len(scale), -(-scale.shape[1] // 2)), MIDDLE | MIDDLE << 4, np.uint8)
    return FourBits(_in_pairs(stored).reshape(len(scale), -1, BLOCK // 2), scale[:, :, 0], zero)


def _in_pairs(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[rows, n] -> [rows, n / 2]"""
    return np.asarray(levels[:, ::2] | levels[:, 1::2] << 4, np.uint8)


def _symmetric(matrix: Floats, most: int) -> tuple[npt.NDArray[np.int8], Floats]:
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scale = np.where(largest > 0, largest / most, 1).astype(np.float32)
    return np.rint(blocks / scale).astype(np.int8), scale
