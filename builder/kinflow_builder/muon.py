"""The optimiser: momentum, with the steps of filters and matrices made orthogonal.

Muon (K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024): of a layer's momentum only the
directions are kept, all alike, by five steps of a Newton-Schulz iteration. On small image networks it needs about half
the epochs of plain momentum. torch.optim.Muon takes matrices alone, not filters. Here a step is relative to the
layer's norm, which stays what it was: so one learning rate fits layers with and without normalisation behind them.
Vectors, depthwise filters and heads, whose norm must be free, are stepped by Nesterov momentum.
"""

from __future__ import annotations

import torch

from kinflow_builder.recipe import Training
from kinflow_builder.trunk import Trunk

# Jordan's polynomial: steep at 0, so that few steps bring every singular value to about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
MOMENTUM = 0.6
# A depthwise 3x3 filter bank has no directions to choose among.
MIN_INPUTS = 10


class Muon(torch.optim.Optimizer):  # type: ignore[misc]
    """For the learnable parameters of a trunk. One learning rate for all of them."""

    def __init__(self, trunk: Trunk, settings: Training) -> None:
        learnt = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
        heads = {id(parameter) for parameter in trunk.head_weights}
        hidden = [p for p in learnt if p.ndim in (2, 4) and p[0].numel() >= MIN_INPUTS and id(p) not in heads]
        known = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in learnt if id(parameter) not in known]
        plain = {"momentum": settings.momentum, "orthogonal": False}
        groups = [
            {"params": hidden, "momentum": MOMENTUM, "orthogonal": True, "decay": 0.0},
            {"params": [p for p in rest if p.ndim > 1], **plain, "decay": settings.weight_decay},
            # Biases and normalisation are not decayed.
            {"params": [p for p in rest if p.ndim <= 1], **plain, "decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": settings.learning_rate})

    def set_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate

    def step(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group["lr"], group["momentum"], group["decay"], group["orthogonal"])

    def _step(self, parameter: torch.Tensor, rate: float, momentum: float, decay: float, orthogonal: bool) -> None:
        state = self.state[parameter]
        velocity = state.setdefault("velocity", torch.zeros_like(parameter))
        velocity.mul_(momentum).add_(parameter.grad)
        direction = parameter.grad.add(velocity, alpha=momentum)
        if not orthogonal:
            parameter.mul_(1 - rate * decay).add_(direction, alpha=-rate)
            return
        direction = orthogonalised(direction.reshape(len(direction), -1)).view_as(parameter)
        norm = parameter.norm()
        parameter.add_(direction, alpha=-rate * float(norm / (direction.norm() + 1e-7)))
        parameter.mul_(norm / (parameter.norm() + 1e-7))


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with all its singular values brought to about 1."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
