"""Fine-tunes a server's stitched member on unlabelled images: both its answers towards what each model says itself.

The device's features are computed once, through the graph that ships, quantised and decoded; only what the
server runs is trained, on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kinflow_builder.stitch import Continued

WARMUP = 0.1
# Of the learning rate, for the models' own layers.
MODEL_SHARE = 0.05
# Images of which the loss before training is taken.
FEW = 64


@dataclass(frozen=True)
class Lesson:
    """What one member learns from: all tensors have the same images in the same order."""

    features: torch.Tensor
    """Decoded, as the server gets them."""
    small: torch.Tensor
    """Logits of the smallest member as it was given."""
    large: torch.Tensor
    """Logits of the larger member as it was given."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast."""

    epochs: int
    batch: int
    learning_rate: float
    seed: int


def distil(member: Continued, lesson: Lesson, pace: Pace, report: Callable[[int, float], None]) -> None:
    """Trains `member` in place; `report(epoch, mean loss)` before the first epoch, of some images, and after each.

    The loss is the divergence of each answer from its model's own (Hinton et al., arXiv 1503.02531, at
    temperature 1). Adam, the learning rate a short rise and a cosine down to zero; the models, which are good
    already, move more slowly than what was put before them.
    """
    added = [*member.restore.parameters(), *member.adapter.parameters()]
    models = [*member.small.parameters(), *member.large.parameters()]
    optimiser = torch.optim.Adam([{"params": added, "share": 1.0}, {"params": models, "share": MODEL_SHARE}])
    generator = torch.Generator().manual_seed(pace.seed)
    steps = max(1, len(lesson.features) // pace.batch)
    # The networks' statistics are folded in or fixed: only weights move.
    member.eval()
    report(0, _loss_before(member, lesson, pace.batch))
    for epoch in range(pace.epochs):
        order = torch.randperm(len(lesson.features), generator=generator)
        total = 0.0
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = (
                    group["share"] * pace.learning_rate * _pace((epoch * steps + step) / (pace.epochs * steps))
                )
            total += _step(member, lesson, order[step * pace.batch : (step + 1) * pace.batch], optimiser)
        report(epoch + 1, total / steps)


def _step(
    member: Continued,
    lesson: Lesson,
    chosen: torch.Tensor,
    optimiser: torch.optim.Optimizer,
) -> float:
    loss = _loss(member, lesson, chosen)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def _loss_before(member: Continued, lesson: Lesson, batch: int) -> float:
    some = torch.linspace(0, len(lesson.features) - 1, min(len(lesson.features), FEW)).long()
    with torch.no_grad():
        losses = [float(_loss(member, lesson, part)) * len(part) for part in some.split(batch)]
    return sum(losses) / len(some)


def _loss(member: Continued, lesson: Lesson, chosen: torch.Tensor) -> torch.Tensor:
    features = lesson.features[chosen].float().contiguous(memory_format=torch.channels_last)
    small, large = member.answers(features)
    return divergence(small, lesson.small[chosen]) + divergence(large, lesson.large[chosen])


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence from the wanted probabilities, in nats."""
    student = functional.log_softmax(logits.float(), 1)
    teacher = functional.log_softmax(wanted.float(), 1)
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _pace(progress: float) -> float:
    if progress < WARMUP:
        return (progress + 1e-3) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
