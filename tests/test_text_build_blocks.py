"""Matrices in blocks: 8 bits for any, 4 bits where they lose nothing, and products that are right with both."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")

from kinflow_builder.text import graph
from kinflow_builder.text.attention import tensor
from kinflow_builder.text.blocks import BLOCK, eight_bits, four_bits

pytestmark = pytest.mark.builder

RANDOM = np.random.default_rng(0)


def published(rows: int, width: int) -> np.ndarray:
    """As GGUF's Q4_1 has it: 16 levels in each block, float16 steps and offsets."""
    levels = RANDOM.integers(0, 16, (rows, width // BLOCK, BLOCK))
    step = RANDOM.uniform(0.01, 0.1, (rows, width // BLOCK, 1)).astype(np.float16).astype(np.float32)
    offset = (-step * RANDOM.uniform(6, 9, step.shape)).astype(np.float16).astype(np.float32)
    return (levels * step + offset).reshape(rows, width).astype(np.float32)


def restored(matrix: np.ndarray) -> np.ndarray:
    """What the 4 bits stand for, offsets added."""
    packed = four_bits(matrix)
    assert packed is not None
    nibbles, zeros = (np.stack([x & 15, x >> 4], -1).astype(np.float32) for x in (packed.levels, packed.zero))
    levels = nibbles.reshape(len(matrix), -1, BLOCK) - zeros.reshape(len(matrix), -1, 1)[:, : packed.scale.shape[1]]
    values = (levels * packed.scale[:, :, None]).reshape(len(matrix), -1)
    width = matrix.shape[1]
    return values[:, :width] + values[:, width : width + width // BLOCK].repeat(BLOCK, 1)


def test_eight_bits_have_a_scale_for_each_block() -> None:
    """Every value is its level times its block's scale to half a level; a block of zeros stays one."""
    matrix = RANDOM.normal(size=(4, 96)).astype(np.float32)
    matrix[1, :32] = 0
    matrix[2, 32:64] *= 1000
    levels, scale = eight_bits(matrix)
    values = (levels * scale).reshape(matrix.shape)
    assert (np.abs(values - matrix).reshape(4, 3, 32) <= scale * 0.5001).all()
    assert not values[1, :32].any()
    assert np.abs(levels[2]).max() == 127


@pytest.mark.parametrize("width", [64, 96, 1536])
def test_four_bits_are_the_published_ones(width: int) -> None:
    """Each value comes back, but for a 28th of a level: what is left of its block's offset has 4 bits."""
    matrix = published(24, width)
    blocks = matrix.reshape(24, -1, BLOCK)
    step = (blocks.max(2) - blocks.min(2)) / 15
    error = (restored(matrix) - matrix).reshape(blocks.shape)
    # All of a block is off by the same.
    np.testing.assert_allclose(error - error[:, :, :1], 0, atol=1e-5)
    assert (np.abs(error[:, :, 0]) <= step.max(1, keepdims=True) / 28 * 1.01).all()


def test_four_bits_need_not_all_be_used() -> None:
    """A block of one value, of two, and of levels with gaps: all of them fit."""
    matrix = published(3, 96)
    matrix[0, :32] = 0.25
    matrix[1, :32] = np.where(np.arange(32) % 2, 0.5, -0.25)
    matrix[2, :32] = np.array([0, 2, 7])[np.arange(32) % 3] * 0.1 - 0.3
    error = np.abs(restored(matrix) - matrix)
    assert error.max() < 0.05
    assert error[1, :32].max() < 0.05


@pytest.mark.parametrize("place", [(0, 0), (5, 60)])
def test_other_values_stay_in_8_bits(place: tuple[int, int]) -> None:
    """One value between two levels anywhere, or weights as training makes them: not in 4 bits."""
    matrix = published(6, 64)
    block = matrix[place[0]].reshape(-1, BLOCK)[place[1] // BLOCK]
    matrix[place] = block.min() + (block.max() - block.min()) * 0.503 / 1.5
    assert four_bits(matrix) is None
    assert four_bits(RANDOM.normal(size=(4, 64)).astype(np.float32)) is None


@pytest.mark.parametrize("rows", [1, 3])
def test_products_are_right_in_both(rows: int) -> None:
    """onnxruntime multiplies with what is stored: off by what rounding makes, with 4 bits no more than with 8."""
    matrix = published(48, 96)
    hidden = (RANDOM.normal(size=(rows, 96)) + 0.5).astype(np.float32)
    for weight, kinds in ((matrix, [4]), (matrix + RANDOM.normal(size=matrix.shape).astype(np.float32) / 100, [8])):
        writer = graph.Writer("int8")
        writer.node("Identity", [writer.linear("hidden", "weight", weight)], "result")
        made = writer.model([tensor("hidden", [1, rows, 96])], [tensor("result", [1, rows, 48])])
        found = [attribute.i for node in made.graph.node for attribute in node.attribute if attribute.name == "bits"]
        assert found == kinds
        result = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"hidden": hidden[None]})[0][0]
        expected = hidden @ weight.T
        assert 0 < np.sqrt(np.square(result - expected).mean() / np.square(expected).mean()) < 0.02
