"""Trains a trunk: all exits at once, the earlier ones also towards the last, features under a byte budget."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kinflow.manifest import Preprocess
from kinflow_builder import checkpoint
from kinflow_builder.augment import augment
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.muon import Muon
from kinflow_builder.narrow import faster
from kinflow_builder.prune import Pruning
from kinflow_builder.recipe import COARSEST, Recipe, Training
from kinflow_builder.trunk import Pass, Trunk

EVALUATION_BATCH = 100
# The budget is a constraint, not a goal: far above it the penalty is of the size of the losses.
BUDGET_WEIGHT = 1.0


class Inputs:
    """Labelled images in memory, as bytes; preprocessed when they are used."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> None:
        self.images = images
        """uint8 [n, height, width, channels]"""
        self.labels = labels
        """int64 [n]"""
        self._scale, self._offset = scale, offset

    @classmethod
    def read(cls, pictures: Pictures, preprocess: Preprocess) -> Inputs:
        """Raises InputError that names the picture."""
        images = np.stack([image for image, _ in pictures.read(preprocess)])
        return cls.of(
            torch.from_numpy(images.reshape(*images.shape[:3], -1)), torch.from_numpy(pictures.truth), preprocess
        )

    @classmethod
    def of(cls, images: torch.Tensor, labels: torch.Tensor, preprocess: Preprocess) -> Inputs:
        """`images` as in `images` above."""
        std = torch.tensor(preprocess.std)
        return cls(images, labels, 1 / (255 * std), -torch.tensor(preprocess.mean) / std)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, chosen: slice) -> Inputs:
        return Inputs(self.images[chosen], self.labels[chosen], self._scale, self._offset)

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(part.to(device) for part in (self.images, self.labels, self._scale, self._offset)))

    def batch(self, chosen: torch.Tensor | slice) -> torch.Tensor:
        """float32 [n, channels, height, width], channels last in memory."""
        return (self.images[chosen] * self._scale + self._offset).permute(0, 3, 1, 2)


def train(
    trunk: Trunk,
    recipe: Recipe,
    data: Inputs,
    held_out: Inputs,
    work: Path,
    log: BuildLog,
    *,
    fresh: bool,
    teacher: nn.Module | None = None,
    append: bool = False,
) -> Trunk:
    """`trunk` with the averaged weights after the recipe's epochs, in evaluation mode.

    `append`: the log has lines already that belong before these. `teacher`: from images to logits; then it teaches
    all exits, not the last one the others. The state is saved in `work` after every epoch; the next call goes on from
    there, with the same result as in one go, unless `fresh`. Raises SettingsError when the saved state is of another
    recipe.
    """
    settings = recipe.training
    path = work / "checkpoint.pt"
    if fresh:
        path.unlink(missing_ok=True)
    state = checkpoint.load(path, recipe.digest())
    if state is None:
        if not append:
            log.truncate()
        log.line(f"{recipe.id} {recipe.version}: {len(data)} training images, seed {settings.seed}")
    trainer = Trainer(trunk, recipe, data, teacher)
    if state is not None:
        trainer.load_state(state)
        log.line(f"resumed after epoch {trainer.epoch}")
    steps = len(data) // settings.batch
    with log.progress("training", settings.epochs * steps, trainer.epoch * steps) as bar:
        while trainer.epoch < settings.epochs:
            begin, begin_cpu = time.monotonic(), time.process_time()
            loss = trainer.run_epoch(bar.advance)
            checkpoint.save(path, recipe.digest(), trainer.state())
            top1 = evaluate(trainer.average, held_out)
            seconds, cpu = time.monotonic() - begin, time.process_time() - begin_cpu
            right = ", ".join(f"{name} {100 * share:.2f}" for name, share in top1.items())
            sizes = ", ".join(f"{name} {size:.0f}" for name, size in trainer.sizes.items())
            log.line(
                f"epoch {trainer.epoch}/{settings.epochs}: {seconds:.0f} s ({cpu:.0f} s of CPU), "
                f"loss {loss:.3f}, held-out top-1 {right}; estimated bytes {sizes}"
            )
    # Into the untouched trunk: exporters get tensors in their plain memory order.
    trunk.load_state_dict(trainer.average.state_dict())
    trunk.eval()
    return trunk


class Trainer:
    """The trunk, its averaged copy, the optimiser, and where they stand."""

    def __init__(self, trunk: Trunk, recipe: Recipe, data: Inputs, teacher: nn.Module | None = None) -> None:
        self.settings = recipe.training
        self.budget = {split: coding.bytes_target for split, coding in recipe.coding.items()}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trunk = copy.deepcopy(trunk).to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.trunk)
        self.teacher = None if teacher is None else copy.deepcopy(teacher).to(self.device).eval()
        self.data = data.to(self.device)
        self.epoch = 0
        self.steps = 0
        """Since the beginning."""
        self.sizes: dict[str, float] = {}
        self.optimiser = Muon(self.trunk, self.settings)
        self.pruning = Pruning(len(data), self.settings.prune)

    def state(self) -> checkpoint.State:
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "trunk": self.trunk.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "losses": self.pruning.losses,
        }

    def load_state(self, state: checkpoint.State) -> None:
        self.epoch, self.steps = state["epoch"], state["steps"]
        self.trunk.load_state_dict(state["trunk"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.pruning.losses = state["losses"]

    def run_epoch(self, advance: Callable[[], None]) -> float:
        """One pass over the images that take part; the mean loss. Random numbers depend on seed and epoch alone."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + self.epoch)
        order, weights = self.pruning.epoch(generator, self.epoch / settings.epochs)
        steps = len(order) // settings.batch
        self.trunk.train()
        self.trunk.apply(_hold_frozen)
        total = 0.0
        for step in range(steps):
            chosen = order[step * settings.batch : (step + 1) * settings.batch]
            progress = (self.epoch + step / steps) / settings.epochs
            total += self._step(chosen, weights[chosen], generator, progress)
            self._update_average()
            self.steps += 1
            advance()
        for _ in range(len(self.data) // settings.batch - steps):
            advance()
        self.epoch += 1
        return total / max(steps, 1)

    def _step(self, chosen: torch.Tensor, weights: torch.Tensor, generator: torch.Generator, progress: float) -> float:
        settings = self.settings
        self.optimiser.set_rate(learning_rate(settings, progress))
        force = quantising(settings, progress)
        there = chosen.to(self.device)
        images = augment(self.data.batch(there), settings, generator)
        quantised = torch.rand(len(chosen), generator=generator) < force * (1 - settings.unquantised)
        coarse = torch.rand(len(chosen), generator=generator) < settings.coarse
        wider = 1 + (COARSEST - 1) * torch.rand(len(chosen), generator=generator)
        coarseness = torch.where(coarse, wider, 1.0) * quantised
        with faster(self.device):
            result = self.trunk(images, coarseness.to(self.device))
            with torch.no_grad():
                taught = None if self.teacher is None else self.teacher(images).float()
        losses = exit_losses(result, self.data.labels[there], settings, taught)
        self.pruning.saw(chosen, losses)
        weights = weights.to(self.device)
        loss = (losses * weights).sum() / weights.sum() + force * self._rate_loss(result)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def _rate_loss(self, result: Pass) -> torch.Tensor:
        """How far each split's features are above their budget, as a share of it."""
        penalty = torch.zeros((), device=self.device)
        for split, bottleneck in self.trunk.bottlenecks.items():
            size = bottleneck.rate_bytes(result.features[split])
            self.sizes[split] = float(size.detach())
            penalty = penalty + BUDGET_WEIGHT * functional.relu(size / self.budget[split] - 1)
        return penalty

    def _update_average(self) -> None:
        """Exponential average of the weights; its memory grows with the steps at first."""
        decay = min(self.settings.average, (1 + self.steps) / (10 + self.steps))
        # Not state_dict(), which names a tensor that two members share twice.
        pairs = zip(_tensors(self.average), _tensors(self.trunk), strict=True)
        with torch.no_grad():
            for mean, now in pairs:
                if mean.dtype.is_floating_point:
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def learning_rate(settings: Training, progress: float) -> float:
    """One cycle (Smith and Topin, arXiv 1708.07120): a cosine up to the peak, a cosine down to almost 0."""
    if progress < settings.warmup:
        return settings.learning_rate * (0.04 + 0.96 * (1 - math.cos(math.pi * progress / settings.warmup)) / 2)
    share = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * (1e-4 + (1 + math.cos(math.pi * share)) / 2)


def quantising(settings: Training, progress: float) -> float:
    """How much of the quantiser is in force, 0 to 1: features find their meaning before they are made coarse."""
    if progress < settings.quantise_from:
        return 0.0
    return min(1.0, progress / settings.quantise_from - 1) if settings.quantise_from else 1.0


def exit_losses(
    result: Pass, labels: torch.Tensor, settings: Training, taught: torch.Tensor | None = None
) -> torch.Tensor:
    """[n]: of each image, the weighted sum over the exits; the earlier ones also learn from the last one.

    `taught`: a teacher's logits, from which all of them learn instead.
    """
    last = list(result.logits)[-1]
    source = result.logits[last].detach().float() if taught is None else taught
    teacher = functional.log_softmax(source, 1)
    total = torch.zeros(len(labels), device=labels.device)
    for name, logits in result.logits.items():
        values = logits.float()
        loss = functional.cross_entropy(values, labels, reduction="none", label_smoothing=settings.label_smoothing)
        if name != last or taught is not None:
            student = functional.log_softmax(values, 1)
            divergence = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
            loss = (1 - settings.distil) * loss + settings.distil * divergence
        total = total + settings.exit_weights[name] * loss
    return total


def evaluate(trunk: nn.Module, data: Inputs) -> dict[str, float]:
    """Top-1 share of each exit, with quantised features at every split."""
    device = next(trunk.parameters()).device
    trunk.eval()
    right: dict[str, int] = {}
    with torch.no_grad(), faster(device):
        for begin in range(0, len(data), EVALUATION_BATCH):
            part = slice(begin, begin + EVALUATION_BATCH)
            labels = data.labels[part].to(device)
            for name, logits in trunk(data.batch(part).to(device)).logits.items():
                right[name] = right.get(name, 0) + int((logits.argmax(1) == labels).sum())
    return {name: count / len(data) for name, count in right.items()}


def _hold_frozen(module: nn.Module) -> None:
    """Frozen normalisation keeps its statistics too."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.train(module.training and module.weight.requires_grad)
