"""Trains a branch: from the features at its split to what the model's last layer made of the same text.

The head is the model's own and stays as it is. With its 49,000 rows it would cost more than the branch itself:
probabilities are compared among the tokens that the model thinks likely somewhere in the step, and some at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kinflow_builder.narrow import faster
from kinflow_builder.text.llama import Stack, whole
from kinflow_builder.text.recipe import Training

WARMUP = 0.05
# Of the learning rate, at the end.
LAST = 0.02
DECAY = 0.01
BETAS = (0.9, 0.95)
MAX_NORM = 1.0
RANDOM = 1024


@dataclass(frozen=True)
class Lesson:
    """All texts of the corpus, as one branch needs them."""

    features: list[torch.Tensor]
    """float16 [tokens, width] of each text, at the split."""
    final: list[torch.Tensor]
    """float16 [tokens, width] of each text, normed: what the head makes the model's logits of."""
    likely: list[torch.Tensor]
    """int32 [tokens, LIKELY]: the model's likeliest next tokens."""

    def part(self, begin: int, end: int) -> Lesson:
        return Lesson(self.features[begin:end], self.final[begin:end], self.likely[begin:end])

    def __len__(self) -> int:
        return len(self.features)


class Trainer:
    """A branch, its optimiser and where they stand."""

    def __init__(self, branch: Stack, head: torch.Tensor, lesson: Lesson, spec: Training) -> None:
        """`head`: [vocabulary, width]"""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.branch = branch.to(self.device).train().requires_grad_(True)
        self.head = head.to(self.device)
        self.lesson = lesson
        self.spec = spec
        self.epoch = 0
        self.steps = max(1, len(lesson) // spec.texts)
        matrices = [parameter for parameter in branch.parameters() if parameter.ndim == 2]
        norms = [parameter for parameter in branch.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, betas=BETAS)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "branch": self.branch.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.branch.load_state_dict(state["branch"])
        self.optimiser.load_state_dict(state["optimiser"])

    def run_epoch(self, done: Callable[[], None]) -> float:
        """One pass over the texts; the mean divergence. Random numbers depend on seed and epoch alone."""
        random = torch.Generator().manual_seed(self.spec.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lesson), generator=random)
        total = 0.0
        for step in range(self.steps):
            progress = (self.epoch * self.steps + step + 0.5) / (self.spec.epochs * self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = self.spec.learning_rate * rate(progress)
            total += self._step(order[step * self.spec.texts : (step + 1) * self.spec.texts].tolist(), random)
            done()
        self.epoch += 1
        return total / self.steps

    def _step(self, chosen: list[int], random: torch.Generator) -> float:
        features, final = (
            torch.stack([part[number] for number in chosen]).to(self.device, torch.float32)
            for part in (self.lesson.features, self.lesson.final)
        )
        likely = torch.cat([self.lesson.likely[number].flatten() for number in chosen])
        tokens, weight = _some(likely, len(self.head), random)
        rows = self.head[tokens.to(self.device)]
        with faster(self.device):
            hidden, _ = whole(self.branch, features)
            divergence = _divergence(hidden, final, rows, weight.to(self.device))
        distance = functional.smooth_l1_loss(hidden.float(), final) / final.abs().mean()
        self.optimiser.zero_grad(set_to_none=True)
        (divergence + self.spec.hidden_weight * distance).backward()
        torch.nn.utils.clip_grad_norm_(self.branch.parameters(), MAX_NORM)
        self.optimiser.step()
        return float(divergence.detach())


def _some(likely: torch.Tensor, vocabulary: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logarithm of how many each one stands for: likely ones for themselves, some for all others."""
    listed = torch.zeros(vocabulary, dtype=torch.bool)
    listed[likely.long()] = True
    others = (~listed).nonzero().flatten()
    some = others[torch.randperm(len(others), generator=random)[:RANDOM]]
    known = listed.nonzero().flatten()
    weight = torch.zeros(len(known) + len(some))
    weight[len(known) :] = math.log(max(1.0, len(others) / max(1, len(some))))
    return torch.cat([known, some]), weight


def _divergence(hidden: torch.Tensor, final: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler, mean over tokens, between the probabilities of some tokens; rows [some, width] of the head.

    `weight` [some]: the logarithm of how many tokens each one stands for.
    """
    with torch.no_grad():
        taught = functional.log_softmax(functional.linear(final, rows).flatten(0, 1) + weight, 1)
    said = functional.log_softmax(functional.linear(hidden, rows).flatten(0, 1) + weight, 1)
    return functional.kl_div(said, taught, log_target=True, reduction="batchmean")


def rate(progress: float) -> float:
    """Of the learning rate, at a share of all steps: up in a line, down in a cosine."""
    if progress < WARMUP:
        return progress / WARMUP
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


@torch.inference_mode()  # type: ignore[untyped-decorator]
def agreement(branch: Stack, head: torch.Tensor, lesson: Lesson, own: Sequence[torch.Tensor]) -> float:
    """Share of the positions whose next token is the model's greedy choice where the branch chooses it too.

    `own`: bool [tokens] of each text: the token is such a choice.
    """
    same = count = 0
    for features, final, chosen in zip(lesson.features, lesson.final, own, strict=True):
        places = chosen[1:].nonzero().flatten().to(head.device)
        hidden, _ = whole(branch, features[None].to(head.device, torch.float32))
        said, taught = (
            functional.linear(values[places], head).argmax(-1)
            for values in (hidden[0], final.to(head.device, torch.float32))
        )
        same, count = same + int((said == taught).sum()), count + len(places)
    return same / max(count, 1)
