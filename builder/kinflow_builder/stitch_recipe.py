"""The recipe of a stitched family: pretrained members instead of a network to train."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec

from kinflow.errors import SettingsError
from kinflow.manifest import Positive, PositiveFloat, Preprocess, Share
from kinflow.messages import Name
from kinflow_builder.recipe import RECIPE, Coding, Count, Data, Exit, Recipe, Wanted
from kinflow_builder.wheels import Weights


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pretrained member."""

    make: Annotated[str, msgspec.Meta(pattern=r"^.+\.py:\w+$")]
    """`file.py:function`, relative to the recipe; it returns a Pretrained. With `weights` it is given the state
    dictionary that they hold, else nothing."""
    weights: Weights | None = None


class Stitch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the members are aligned."""

    members: dict[Name, Source]
    """Smallest first: the device's. Segments and exits have the same names."""
    split: Name
    """Where features leave the device; both halves of every Pretrained meet there."""
    side: Positive
    """Hidden values are transformed in patches of that many pixels each way."""
    channels: Positive
    """Directions that are kept of each patch."""
    share: Share = 0.5
    """Weight of the larger member's answer on its server; the rest is the device's own member, continued."""
    bent: bool = True
    """Adapters get a nonlinear part, which only distillation trains."""
    calibration: Positive = 128
    """Pictures from which an int8 graph's ranges are taken."""


class Distillation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How servers' members are fine-tuned. 0 epochs leave what least squares found."""

    epochs: Count
    batch: Positive
    learning_rate: PositiveFloat
    crops: Count
    """Random parts of each picture, besides its centre."""
    seed: int
    threads: Positive


class StitchRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A family to build from members that are trained already. `load` is the way to make one."""

    id: Name
    version: Name
    title: str
    license: str
    labels: Annotated[list[str], msgspec.Meta(min_length=2)]
    members: dict[Name, list[Name]]
    tflite_segments: list[Name]
    precision: dict[Name, Wanted]
    preprocess: Preprocess
    data: Data
    stitch: Stitch
    training: Distillation
    coding: dict[Name, Coding]
    exits: dict[Name, Exit]
    float_layers: dict[Name, Count] = {}
    """As in Recipe."""

    def __post_init__(self) -> None:
        if "auto" in self.precision.values():
            # Larger members learn from what the device's graph computes: it has to be decided before.
            raise ValueError("precision is 'auto', a stitched family needs it named")

    def seen_digest(self) -> str:
        """What the members' saved hidden values and answers are bound to."""
        name = next(iter(self.stitch.members))
        made = (self.precision.get(name), self.float_layers.get(name, 0), self.stitch.calibration)
        drawn = (self.training.crops, self.training.seed)
        return _digest(self.data, self.preprocess, self.stitch.members, made, drawn)

    def digest(self) -> str:
        """What distilled weights are bound to: that, and how features are made and learnt from."""
        budgets = {split: coding.bytes_target for split, coding in self.coding.items()}
        return _digest(self.seen_digest(), self.stitch, self.training, budgets)


def _digest(*parts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


AnyRecipe = Recipe | StitchRecipe


def load(folder: Path) -> AnyRecipe:
    """From `folder`/recipe.toml, or a file: a StitchRecipe where it has a table `stitch`, else a Recipe.

    Raises SettingsError that names file, field and what was expected.
    """
    path = folder if folder.suffix == ".toml" else folder / RECIPE
    try:
        raw = path.read_bytes()
        if "stitch" not in msgspec.toml.decode(raw):
            return Recipe.load(folder)
        return msgspec.toml.decode(raw, type=StitchRecipe)
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}: give the folder of a family's recipe") from exc
    except msgspec.DecodeError as exc:  # ValidationError is one of them
        raise SettingsError(f"{path}: {exc}") from exc
