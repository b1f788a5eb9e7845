"""A recipe for people who write none: from a model and a folder of pictures, everything else is measured.

How a trained model wants its images is measured (own_input.py), where to cut it too (choose.py), and how many epochs
fit into the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from kinflow.manifest import Preprocess
from kinflow_builder import folders, readable
from kinflow_builder.align import trunk_from
from kinflow_builder.blocks import blocks_of
from kinflow_builder.calibrate import fewest
from kinflow_builder.choose import Candidate, candidates, choose_splits, even_splits
from kinflow_builder.classes import some
from kinflow_builder.exits import TEMPERATURE_SHARE
from kinflow_builder.folders import Division
from kinflow_builder.own_input import prepared, sized
from kinflow_builder.recipe import Branches, Coding, Exit, FolderData, Network, Recipe, Training
from kinflow_builder.train import Inputs, Trainer
from kinflow_builder.trunk import make_network

MEMBERS = {2: ["device", "cloud"], 3: ["device", "edge", "cloud"]}
PROBED = 1500
TRIED = 400
# However long a step takes: fewer steps teach nothing, more add nothing.
MIN_STEPS, MAX_STEPS = 600, 12_000
MIN_EPOCHS = 4
TIMED_STEPS = 4
# The whole chain's gap: the least that so many pictures can certify with room for some losses.
EPSILONS, DELTA = (0.01, 0.02, 0.03, 0.05, 0.1), 0.05
ROOM = 2.5


@dataclass(frozen=True)
class Wishes:
    """What the author said; None: measured or chosen."""

    make: str
    """`file.py:function`, absolute."""
    images: Path
    name: str
    size: tuple[int, int] | None = None
    """Height and width of the model's input."""
    splits: list[str] | None = None
    """Blocks after which the model is cut."""
    minutes: float = 15.0
    seed: int = 0
    threads: int = 2
    tflite: bool = True


@dataclass(frozen=True)
class Proposal:
    """A recipe, and what it was chosen from."""

    recipe: Recipe
    images: Division
    accuracy: float
    """Of the model as it was given, on training pictures."""
    trained: bool
    """It is better than guessing, so its weights are worth keeping."""
    found: list[Candidate]


def propose(wishes: Wishes, say: Callable[[str], None]) -> Proposal:
    """Raises SettingsError for the model, InputError for the pictures; `say` gets a line for each finding."""
    torch.manual_seed(wishes.seed)
    torch.set_num_threads(wishes.threads)
    data = FolderData(str(wishes.images), "not stated", str(wishes.images.resolve()))
    images = folders.divide(wishes.images, held_out=data.held_out, test=data.test, seed=wishes.seed)
    labels = images.train.classes
    parts = ", ".join(f"{name} {len(part)}" for name, part in zip(images._fields, images, strict=True))
    say(f"{wishes.images}: {len(labels)} classes, pictures: {parts}")
    for line in (*readable.overlooked(wishes.images, images), *_missing(images)):
        say(f"  {line}")
    readable.check(images, wishes.threads)

    model = make_network(Path(), Network(wishes.make)).eval()
    spec = sized(model, wishes.size, images.train)
    spec, accuracy = prepared(model, spec, images.train.spread(TRIED))
    guess = float(np.bincount(images.train.truth).max() / len(images.train))
    trained = accuracy > guess + 4 * (guess * (1 - guess) / min(TRIED, len(images.train))) ** 0.5
    state = "trained, it teaches the members" if trained else "not trained: it will be"
    say(f"model: input {spec.mode} {spec.height}x{spec.width}, top-1 {100 * accuracy:.1f} as given: {state}")

    sample = Inputs.read(images.train.spread(PROBED), spec)
    blocks = blocks_of(model, sample.batch(slice(0, 1)))
    found = candidates(blocks, sample.batch(slice(None)), sample.labels.numpy(), len(labels))
    chosen = choose_splits(found) if trained else even_splits(found)
    after = wishes.splits or [candidate.name for candidate in chosen]
    for candidate in found:
        mark = " <- cut" if candidate.name in after else ""
        shape = "x".join(map(str, candidate.shape))
        say(
            f"  after {candidate.name}: {100 * candidate.cost_share:.0f}% of the cost, features {shape}, "
            f"a probe tells {100 * candidate.accuracy:.1f}%{mark}"
        )
    epsilon = _epsilon(len(images.held_out), len(after))
    say(f"{len(images.held_out)} pictures are held out: {_promised(len(images.held_out), epsilon, len(after))}")
    recipe = _recipe(wishes, data, spec, labels, after, found, epsilon, trained=trained)
    recipe = _with_epochs(recipe, wishes, model, sample, len(images.train))
    say(f"training: {recipe.training.epochs} epochs")
    return Proposal(recipe, images, accuracy, trained, found)


def _recipe(
    wishes: Wishes,
    data: FolderData,
    spec: Preprocess,
    labels: list[str],
    after: list[str],
    found: list[Candidate],
    epsilon: float,
    *,
    trained: bool,
) -> Recipe:
    shapes = {candidate.name: candidate.shape for candidate in found}
    members = MEMBERS.get(len(after) + 1, ["device", *(f"edge{i}" for i in range(1, len(after))), "cloud"])
    channels = [_channels(shapes.get(name, (64, 1, 1))) for name in after]
    weights = [0.3, 0.5, 1.0][-len(members) :] if len(members) <= 3 else [0.5] * (len(members) - 1) + [1.0]
    large = spec.height > 96
    return Recipe(
        id=wishes.name,
        version="1.0.0",
        title=f"{wishes.name}, from {Path(wishes.make).name}",
        license="not stated",
        labels=labels,
        members={member: members[: index + 1] for index, member in enumerate(members)},
        tflite_segments=members[:1] if wishes.tflite else [],
        preprocess=spec,
        data=data,
        network=Network(wishes.make),
        precision={members[0]: "auto", **dict.fromkeys(members[1:], "half")},
        branches=Branches(after, channels, teacher=trained),
        training=Training(
            epochs=MIN_EPOCHS,
            batch=32 if large else 64,
            learning_rate=0.02 if trained else 0.06,
            warmup=0.2,
            momentum=0.9,
            weight_decay=5e-4,
            label_smoothing=0.05,
            average=0.99,
            exit_weights=dict(zip(members, weights, strict=True)),
            distil=0.5,
            shift=max(1, spec.height // 28),
            mirror=spec.mode == "RGB",
            erase=0,
            unquantised=0.2,
            coarse=0.2,
            quantise_from=0.1,
            seed=wishes.seed,
            threads=wishes.threads,
        ),
        coding={
            f"s{number}": Coding(_target(shapes.get(name, (64, 7, 7)), count), rates=[1.5, 2.0])
            for number, (name, count) in enumerate(zip(after, channels, strict=True), 1)
        },
        exits={member: Exit(epsilon / (len(members) - 1), DELTA) for member in members[:-1]},
    )


def _epsilon(count: int, exits: int) -> float:
    """Split among the exits: with epsilon each, at least ln(delta) / ln(1 - epsilon) pictures without a loss."""
    certifying = count * (1 - TEMPERATURE_SHARE)
    enough = [e for e in EPSILONS if certifying >= ROOM * math.log(DELTA) / math.log(1 - e / exits)]
    return enough[0] if enough else EPSILONS[-1]


def _promised(count: int, epsilon: float, exits: int) -> str:
    least = math.ceil(fewest(epsilon / exits, DELTA) / (1 - TEMPERATURE_SHARE))
    if count >= least:
        return f"the gap to the largest member is to be at most {epsilon:g}"
    return (
        f"too few to certify anything, {least} are the least. Devices will offload every answer, unless `threshold` in "
        "their settings names a confidence at which they keep one"
    )


def _missing(images: Division) -> Iterator[str]:
    """A line for each part that lacks classes."""
    for name, part in zip(images._fields, images, strict=True):
        there = set(part.truth.tolist())
        lacking = [label for index, label in enumerate(part.classes) if index not in there]
        if lacking:
            yield f"{name} has no picture of {some(lacking)}"


def _channels(shape: tuple[int, ...]) -> int:
    """Of the features that are sent: a quarter of the block's, within reason."""
    return int(np.clip((shape[0] if len(shape) == 3 else shape[1]) // 4, 8, 48))


def _target(shape: tuple[int, ...], channels: int) -> float:
    """Bytes of one item: about one bit per value that is sent."""
    if len(shape) == 3:
        stride = max(1, -(-max(shape[1:]) // 14))
        positions = (shape[1] // stride) * (shape[2] // stride)
    else:
        positions = shape[0]
    return float(max(48, positions * channels // 8))


def _with_epochs(recipe: Recipe, wishes: Wishes, model: nn.Module, sample: Inputs, count: int) -> Recipe:
    """As many epochs as fit into the time, by the time that a few steps take here."""
    batch = min(recipe.training.batch, max(8, count // 8))
    recipe = msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, batch=batch))
    few = sample.part(slice(0, batch * TIMED_STEPS))
    trainer = Trainer(trunk_from(recipe, model), recipe, few, model)
    trainer.run_epoch(lambda: None)
    start = time.perf_counter()
    trainer.run_epoch(lambda: None)
    step_s = (time.perf_counter() - start) / max(1, len(few) // batch)
    steps = np.clip(60 * wishes.minutes / step_s, MIN_STEPS, MAX_STEPS)
    epochs = max(MIN_EPOCHS, round(steps * batch / count))
    return msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, epochs=epochs))
