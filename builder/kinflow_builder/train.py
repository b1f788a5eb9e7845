"""Trains a trunk: all exits at once, the earlier ones also towards the last, features under a byte budget."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from kinflow_builder import checkpoint
from kinflow_builder.augment import augment
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Recipe, Training
from kinflow_builder.trunk import Pass, Trunk

EVALUATION_BATCH = 500
# The budget is a constraint, not a goal: far above it the penalty is of the size of the losses.
BUDGET_WEIGHT = 1.0


@dataclass(frozen=True)
class Inputs:
    """Preprocessed images float32 [n, channels, height, width] and labels int64 [n]."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def train(
    trunk: Trunk, recipe: Recipe, data: Inputs, held_out: Inputs, work: Path, log: BuildLog, *, fresh: bool
) -> Trunk:
    """`trunk` with the averaged weights after the recipe's epochs, in evaluation mode.

    Saves its state in `work` after every epoch and goes on from there, with the same result as in one go,
    unless `fresh`. Raises SettingsError when the saved state is of another recipe.
    """
    settings = recipe.training
    path = work / "checkpoint.pt"
    if fresh:
        path.unlink(missing_ok=True)
    state = checkpoint.load(path, recipe.digest())
    if state is None:
        log.truncate()
        log.line(f"{recipe.id} {recipe.version}: {len(data.labels)} training images, seed {settings.seed}")
    trainer = Trainer(trunk, recipe, data)
    if state is not None:
        trainer.load_state(state)
        log.line(f"resumed after epoch {trainer.epoch}")
    steps = len(data.labels) // settings.batch
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

    def __init__(self, trunk: Trunk, recipe: Recipe, data: Inputs) -> None:
        self.settings = recipe.training
        self.budget = {split: coding.bytes_target for split, coding in recipe.coding.items()}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trunk = copy.deepcopy(trunk).to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.trunk)
        self.images = torch.from_numpy(data.images).to(self.device)
        self.labels = torch.from_numpy(data.labels).to(self.device)
        self.blank = float(data.images.min())
        self.epoch = 0
        self.sizes: dict[str, float] = {}
        # Biases and normalisation are not decayed.
        matrices = [p for p in self.trunk.parameters() if p.ndim > 1]
        vectors = [p for p in self.trunk.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.SGD(
            [{"params": matrices, "weight_decay": self.settings.weight_decay}, {"params": vectors}],
            self.settings.learning_rate,
            momentum=self.settings.momentum,
            nesterov=True,
        )

    def state(self) -> checkpoint.State:
        return {
            "epoch": self.epoch,
            "trunk": self.trunk.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def load_state(self, state: checkpoint.State) -> None:
        self.epoch = state["epoch"]
        self.trunk.load_state_dict(state["trunk"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])

    def run_epoch(self, advance: Callable[[], None]) -> float:
        """One pass over the images; the mean loss. Random numbers depend on seed and epoch alone."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator).to(self.device)
        steps = len(self.labels) // settings.batch
        self.trunk.train()
        total = 0.0
        for step in range(steps):
            done = self.epoch * steps + step
            chosen = order[step * settings.batch : (step + 1) * settings.batch]
            total += self._step(chosen, generator, done / (settings.epochs * steps))
            self._update_average(done)
            advance()
        self.epoch += 1
        return total / max(steps, 1)

    def _step(self, chosen: torch.Tensor, generator: torch.Generator, progress: float) -> float:
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(settings, progress)
        force = quantising(settings, progress)
        images = augment(self.images[chosen], settings.shift, settings.erase, self.blank, generator)
        quantised = torch.rand(len(chosen), generator=generator) < force * (1 - settings.unquantised)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            result = self.trunk(images, ~quantised.to(self.device))
        loss = exit_loss(result, self.labels[chosen], settings) + force * self._rate_loss(result)
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

    def _update_average(self, done: int) -> None:
        """Exponential average of the weights; its memory grows with the steps at first."""
        decay = min(self.settings.average, (1 + done) / (10 + done))
        average, trunk = self.average.state_dict().values(), self.trunk.state_dict().values()
        with torch.no_grad():
            for mean, now in zip(average, trunk, strict=True):
                if mean.dtype.is_floating_point:
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)


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


def exit_loss(result: Pass, labels: torch.Tensor, settings: Training) -> torch.Tensor:
    """Weighted sum over the exits; the earlier ones also learn from the last one's probabilities."""
    *earlier, last = result.logits
    teacher = functional.log_softmax(result.logits[last].detach().float(), 1)
    total = torch.zeros((), device=labels.device)
    for name, logits in result.logits.items():
        values = logits.float()
        loss = functional.cross_entropy(values, labels, label_smoothing=settings.label_smoothing)
        if name in earlier:
            student = functional.log_softmax(values, 1)
            divergence = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
            loss = (1 - settings.distil) * loss + settings.distil * divergence
        total = total + settings.exit_weights[name] * loss
    return total


def evaluate(trunk: nn.Module, data: Inputs) -> dict[str, float]:
    """Top-1 share of each exit, with quantised features at every split."""
    device = next(trunk.parameters()).device
    trunk.eval()
    right: dict[str, int] = {}
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        for begin in range(0, len(data.labels), EVALUATION_BATCH):
            part = slice(begin, begin + EVALUATION_BATCH)
            labels = torch.from_numpy(data.labels[part]).to(device)
            for name, logits in trunk(torch.from_numpy(data.images[part]).to(device)).logits.items():
                right[name] = right.get(name, 0) + int((logits.argmax(1) == labels).sum())
    return {name: count / len(data.labels) for name, count in right.items()}
