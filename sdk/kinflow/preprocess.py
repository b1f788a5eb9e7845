"""An app's image -> the array that the family's first segment takes. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kinflow.errors import InputError
from kinflow.manifest import Preprocess


class Preprocessor:
    """Checks and normalises images as the bundle's manifest says."""

    def __init__(self, spec: Preprocess) -> None:
        channels = len(spec.mean)
        self._plane = (spec.height, spec.width)
        self._shapes: list[tuple[int, ...]] = [(*self._plane, channels)]
        if channels == 1:
            self._shapes.append(self._plane)
        std = np.asarray(spec.std, np.float64).reshape(-1, 1, 1)
        mean = np.asarray(spec.mean, np.float64).reshape(-1, 1, 1)
        # (pixel / 255 - mean) / std as one multiplication and one addition.
        self._scale = (1 / std).astype(np.float32)
        self._byte_scale = (1 / (255 * std)).astype(np.float32)
        self._offset = (-mean / std).astype(np.float32)

    def __call__(self, image: Any) -> npt.NDArray[np.float32]:
        """float32 [1, channels, height, width] from one image.

        `image`: uint8 0…255 or float32 0…1, [height, width, channels], or [height, width] where there is one
        channel. Raises InputError that says what was expected and what came.
        """
        if not isinstance(image, np.ndarray):
            raise InputError(f"an image is a numpy array, got {type(image).__name__}: kinflow.read_image reads files")
        if image.shape not in self._shapes:
            expected = " or ".join(str(shape) for shape in self._shapes)
            raise InputError(f"the image's shape is {image.shape}, this family takes {expected}")
        if image.dtype == np.uint8:
            scale = self._byte_scale
        elif image.dtype == np.float32:
            scale = self._scale
            # min() of an array with a NaN is NaN, which no comparison holds for.
            if not (image.min() >= 0.0 and image.max() <= 1.0):
                raise InputError("a float32 image has values from 0 to 1, this one has others, or NaN")
        else:
            raise InputError(f"the image's dtype is {image.dtype}, this family takes uint8 (0…255) or float32 (0…1)")
        planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        batch = np.multiply(planes, scale, dtype=np.float32)
        batch += self._offset
        return batch[None]
