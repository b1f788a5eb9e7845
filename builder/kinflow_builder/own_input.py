"""What goes into a stranger's model: size, channels, and how pixels are scaled, found by trying.

Of the usual ways to scale the one is taken with which the model is right most often.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import nn

from kinflow.errors import InputError, SettingsError
from kinflow.manifest import Preprocess
from kinflow_builder.classes import some
from kinflow_builder.folders import Pictures
from kinflow_builder.train import Inputs

# Mean and standard deviation: ImageNet's, -1 to 1, 0 to 1.
USUAL = (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3), ([0.0] * 3, [1.0] * 3))
LARGE_SIDE = 224
LIKELY_SIDES = (224, 160, 128, 96, 64, 48, 32, 28)


def sized(model: nn.Module, wanted: tuple[int, int] | None, pictures: Pictures) -> Preprocess:
    """With the size `wanted`, or else the first of the likely ones with which the model gives one logit per class.

    Raises SettingsError for a model that gives none, and InputError for a picture that cannot be read.
    """
    channels = _input_channels(model)
    own = _own_sizes(pictures)
    sides = [wanted] if wanted else [*own, *((side, side) for side in LIKELY_SIDES)]
    problems = []
    for height, width in sides:
        try:
            with torch.no_grad():
                logits = model(torch.zeros(2, channels, height, width))
        except (RuntimeError, AssertionError, ValueError) as exc:
            problems.append(f"{height}x{width}: {str(exc).splitlines()[0][:120]}")
            continue
        _check_logits(logits, pictures)
        if logits.ndim == 2:
            mode, resize = ("L", "stretch") if channels == 1 else ("RGB", "stretch" if len(own) == 1 else "crop")
            mean, std = [0.0] * channels, [1.0] * channels
            return msgspec.convert(
                {"mode": mode, "height": height, "width": width, "mean": mean, "std": std, "resize": resize}, Preprocess
            )
        problems.append(f"{height}x{width}: gives {list(logits.shape)}")
    raise SettingsError(
        f"the model takes no image [2, {channels}, height, width] to logits [2, {len(pictures.classes)}]: "
        f"{'; '.join(problems)}. --size HEIGHTxWIDTH names its input"
    )


def _check_logits(logits: object, pictures: Pictures) -> None:
    """No other size would mend these."""
    classes = pictures.classes
    if not isinstance(logits, torch.Tensor):
        raise SettingsError(f"the model returns {type(logits).__name__}, expected a tensor of logits")
    if logits.ndim == 2 and logits.shape[1] != len(classes):
        raise SettingsError(
            f"the model gives {logits.shape[1]} logits, the pictures have {len(classes)} classes ({some(classes)}): "
            "expected a logit for each, as of a last layer made for these classes"
        )


def _input_channels(model: nn.Module) -> int:
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    channels = 3 if filters is None else int(filters.shape[1])
    if channels not in (1, 3):
        raise SettingsError(f"the model's first filters take {channels} channels, expected 1 (grey) or 3 (RGB)")
    return channels


def _own_sizes(pictures: Pictures) -> list[tuple[int, int]]:
    """The pictures' own height and width where all are alike and small, else a size near theirs."""
    sizes = []
    for item in list(pictures.spread(40).items):
        if isinstance(item, Path):
            try:
                with Image.open(item) as opened:
                    sizes.append((opened.height, opened.width))
            except OSError as exc:
                raise InputError(f"{item} is no picture that can be read: {exc}") from exc
        else:
            sizes.append((int(item.shape[0]), int(item.shape[1])))
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGE_SIDE:
        return sizes[:1]
    side = int(np.clip(np.median([min(size) for size in sizes]) // 32 * 32, 32, LARGE_SIDE))
    return [(side, side)] if side < LARGE_SIDE else [(LARGE_SIDE, LARGE_SIDE)]


def prepared(model: nn.Module, spec: Preprocess, pictures: Pictures) -> tuple[Preprocess, float]:
    """Mean and deviation with which the model is right most often; the pictures' own where none tells."""
    plain = Inputs.read(pictures, spec)
    values = plain.images.float().flatten(0, 2) / 255
    ours = (values.mean(0).tolist(), (values.std(0) + 1e-3).tolist())
    channels = len(spec.mean)
    best, best_right = spec, -1.0
    for mean, std in (ours, *USUAL):
        mean, std = ([round(value, 4) for value in part[:channels]] for part in (mean, std))
        tried = msgspec.structs.replace(spec, mean=mean, std=std)
        inputs = Inputs.of(plain.images, plain.labels, tried)
        with torch.no_grad():
            parts = [model(inputs.batch(slice(i, i + 50))).argmax(1) for i in range(0, len(inputs), 50)]
        right = float((torch.cat(parts) == plain.labels).float().mean())
        if right > best_right:
            best, best_right = tried, right
    return best, best_right
