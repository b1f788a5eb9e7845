"""A recipe for people who write none: from a model and a folder of pictures, everything else is measured.

What is not known of a trained model is how its images were prepared: of the usual ways the one is taken with which
it is right most often. Where to cut it is measured too (choose.py), and how many epochs fit into the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import nn

from kinflow.errors import InputError, SettingsError
from kinflow.manifest import Preprocess
from kinflow_builder import folders, readable
from kinflow_builder.align import trunk_from
from kinflow_builder.blocks import blocks_of
from kinflow_builder.choose import Candidate, candidates, choose_splits, even_splits
from kinflow_builder.exits import TEMPERATURE_SHARE
from kinflow_builder.folders import Division, Pictures
from kinflow_builder.recipe import Branches, Coding, Exit, FolderData, Network, Recipe, Training
from kinflow_builder.train import Inputs, Trainer
from kinflow_builder.trunk import make_network

MEMBERS = {2: ["device", "cloud"], 3: ["device", "edge", "cloud"]}
# The usual preparations of images, mean and standard deviation: ImageNet's, -1 to 1, 0 to 1.
USUAL = (([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3), ([0.0] * 3, [1.0] * 3))
PROBED = 1500
TRIED = 400
LARGE_SIDE = 224
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
    readable.check(images, wishes.threads)

    model = make_network(Path(), Network(wishes.make)).eval()
    spec = _size(model, wishes, images.train, len(labels))
    spec, accuracy = _prepared(model, spec, _spread(images.train, TRIED))
    guess = float(np.bincount(images.train.truth).max() / len(images.train))
    trained = accuracy > guess + 4 * (guess * (1 - guess) / min(TRIED, len(images.train))) ** 0.5
    state = "trained, it teaches the members" if trained else "not trained: it will be"
    say(f"model: input {spec.mode} {spec.height}x{spec.width}, top-1 {100 * accuracy:.1f} as given: {state}")

    sample = Inputs.read(_spread(images.train, PROBED), spec)
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
    say(f"{len(images.held_out)} pictures are held out: the gap to the largest member is to be at most {epsilon:g}")
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


def _spread(pictures: Pictures, count: int) -> Pictures:
    """`count` of them in random order; files come class by class."""
    order = np.random.default_rng(0).permutation(len(pictures))
    return pictures.part(order[:count])


def _size(model: nn.Module, wishes: Wishes, pictures: Pictures, classes: int) -> Preprocess:
    """The first of the likely input sizes with which the model gives one logit per class."""
    channels = _input_channels(model)
    own = _own_sizes(pictures)
    sides = [wishes.size] if wishes.size else [*own, *((side, side) for side in (224, 160, 128, 96, 64, 48, 32, 28))]
    problems = []
    for height, width in sides:
        try:
            with torch.no_grad():
                logits = model(torch.zeros(2, channels, height, width))
        except (RuntimeError, AssertionError, ValueError) as exc:
            problems.append(f"{height}x{width}: {str(exc).splitlines()[0][:120]}")
            continue
        if logits.ndim == 2 and logits.shape[1] == classes:
            mode, resize = ("L", "stretch") if channels == 1 else ("RGB", "stretch" if len(own) == 1 else "crop")
            mean, std = [0.0] * channels, [1.0] * channels
            return msgspec.convert(
                {"mode": mode, "height": height, "width": width, "mean": mean, "std": std, "resize": resize}, Preprocess
            )
        problems.append(f"{height}x{width}: gives {list(logits.shape)}, the pictures have {classes} classes")
        if wishes.size is None and logits.ndim == 2:
            break
    raise SettingsError(
        f"{wishes.make} takes no image [2, {channels}, height, width] to logits [2, {classes}]: {'; '.join(problems)}. "
        "--size HEIGHTxWIDTH names the model's input"
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
    for item in list(_spread(pictures, 40).items):
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


def _prepared(model: nn.Module, spec: Preprocess, pictures: Pictures) -> tuple[Preprocess, float]:
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
