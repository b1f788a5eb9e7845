"""What a segment costs: parameters, and multiply-accumulates of its convolutions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """Of one item."""

    macs: int
    parameters: int


def cost(module: nn.Module, example: torch.Tensor) -> Cost:
    """`example`: an input of one item. Counts Conv and Linear layers; the rest is small beside them."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        # Each output value is a dot product over what one filter sees.
        per_value = layer.weight.numel() // layer.weight.shape[0]
        total += output.numel() * per_value

    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(total, sum(parameter.numel() for parameter in module.parameters()))
