"""Images become the input by one formula; bad ones are refused with what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from kinflow.errors import InputError
from kinflow.manifest import Preprocess
from kinflow.preprocess import Preprocessor

GREY = Preprocess("L", 3, 4, [0.286], [0.353], "stretch")
COLOUR = Preprocess("RGB", 3, 4, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "crop")


def formula(image: Any, spec: Preprocess) -> Any:
    """(pixel / 255 - mean) / std in float64, for bytes; without the division for floats."""
    pixels = image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
    pixels = pixels.reshape(spec.height, spec.width, len(spec.mean))
    return ((pixels - spec.mean) / spec.std).transpose(2, 0, 1)[None]


@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_it_is_the_formula(spec: Preprocess, dtype: Any) -> None:
    """To float32's rounding, for bytes and for floats, channels first, with a batch axis."""
    rng = np.random.default_rng(0)
    shape = (spec.height, spec.width, len(spec.mean))
    image = rng.integers(0, 256, shape).astype(np.uint8) if dtype == np.uint8 else rng.random(shape, np.float32)
    before = image.copy()
    batch = Preprocessor(spec)(image)
    assert batch.dtype == np.float32
    assert batch.shape == (1, len(spec.mean), spec.height, spec.width)
    np.testing.assert_allclose(batch, formula(image, spec), rtol=1e-5, atol=1e-6)
    assert np.array_equal(image, before)


@given(hnp.arrays(np.uint8, (3, 4)))
def test_bytes_and_floats_of_one_image_agree(image: Any) -> None:
    """uint8 and the same divided by 255 are one picture; a grey one may have its axis of one channel."""
    prepare = Preprocessor(GREY)
    batch = prepare(image)
    np.testing.assert_allclose(prepare((image / 255).astype(np.float32)), batch, atol=2e-6)
    assert np.array_equal(prepare(image[:, :, None]), batch)


def test_any_memory_layout_will_do() -> None:
    """Views, flipped and transposed, as cameras and crops give them."""
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    prepare = Preprocessor(COLOUR)
    assert np.array_equal(prepare(image[:, ::-1]), prepare(np.ascontiguousarray(image[:, ::-1])))
    assert np.array_equal(prepare(np.asfortranarray(image)), prepare(image))
    frozen = image.copy()
    frozen.flags.writeable = False
    assert np.array_equal(prepare(frozen), prepare(image))


def test_the_ends_of_the_range_pass() -> None:
    """Exactly 0 and exactly 1 are pixels."""
    image = np.array([[0.0, 1.0, 0.5, 0.25]] * 3, np.float32)
    assert np.isfinite(Preprocessor(GREY)(image)).all()


def floats(value: float) -> Any:
    image = np.full((3, 4), 0.5, np.float32)
    image[1, 1] = value
    return image


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ([[0] * 4] * 3, "an image is a numpy array, got list"),
        (None, "got NoneType"),
        ("cat.png", "got str: kinflow.read_image reads files"),
        (b"\x00" * 12, "got bytes"),
        (np.zeros((0, 0), np.uint8), r"shape is \(0, 0\), this family takes \(3, 4, 1\) or \(3, 4\)"),
        (np.zeros((4, 3), np.uint8), r"shape is \(4, 3\)"),
        (np.zeros((3, 4, 3), np.uint8), r"shape is \(3, 4, 3\)"),
        (np.zeros((1, 3, 4), np.uint8), r"shape is \(1, 3, 4\)"),
        (np.zeros((1, 3, 4, 1), np.uint8), r"shape is \(1, 3, 4, 1\)"),
        (np.uint8(3), "got uint8"),
        (np.array(3, np.uint8), r"shape is \(\)"),
        (np.zeros((3, 4), np.float64), r"dtype is float64, this family takes uint8 \(0…255\) or float32 \(0…1\)"),
        (np.zeros((3, 4), np.int64), "dtype is int64"),
        (np.zeros((3, 4), np.int8), "dtype is int8"),
        (np.zeros((3, 4), np.float16), "dtype is float16"),
        (np.zeros((3, 4), bool), "dtype is bool"),
        (np.zeros((3, 4), ">f4"), "dtype is >f4"),
        (np.full((3, 4), None, object), "dtype is object"),
        (floats(np.nan), "values from 0 to 1, this one has others, or NaN"),
        (floats(np.inf), "values from 0 to 1"),
        (floats(-np.inf), "values from 0 to 1"),
        (floats(1.0001), "values from 0 to 1"),
        (floats(-0.0001), "values from 0 to 1"),
        (floats(255.0), "values from 0 to 1"),
    ],
)
def test_a_bad_image_is_refused(image: Any, said: str) -> None:
    """Each InputError says what was expected and what came."""
    with pytest.raises(InputError, match=said):
        Preprocessor(GREY)(image)


def test_a_colour_family_takes_no_grey_image() -> None:
    """Only the shape with three channels is named then."""
    with pytest.raises(InputError, match=r"shape is \(3, 4\), this family takes \(3, 4, 3\)$"):
        Preprocessor(COLOUR)(np.zeros((3, 4), np.uint8))
