"""A layer as a pair of factors whose first k components are the best layer of rank k on real inputs.

A layer's matrix W [outputs, inputs] sees inputs with second moments S = E[x xᵀ] = L Lᵀ. With the singular
value decomposition W L = U diag(s) Vᵀ, the first k columns of U √s times the first k rows of √s Vᵀ L⁻¹ are the
matrix of rank k with the least mean squared error of the outputs; that error is the sum of the other s²
(whitening as in SVD-LLM, arXiv 2403.07378). So the components stand in the order of their energy, and a
smaller layer is a prefix of a larger one. A convolution is such a layer on the patches that it sees.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

from kinflow.errors import SettingsError

# Of the mean second moment: directions in which no input ever moves must not be divided by zero.
DAMPING = 1e-5
# They read the weights of the layers inside them instead of calling these.
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Factors(nn.Module):  # type: ignore[misc]
    """What all members share of one layer: `enter` [components, inputs], `leave` [outputs, components].

    `energy` [components]: the share of the outputs' energy that each component carried when they were made.
    """

    def __init__(self, enter: torch.Tensor, leave: torch.Tensor, energy: torch.Tensor) -> None:
        super().__init__()
        self.enter = nn.Parameter(enter)
        self.leave = nn.Parameter(leave)
        self.register_buffer("energy", energy)

    @property
    def components(self) -> int:
        return len(self.enter)

    def parameters_at(self, rank: int) -> int:
        """Of the cheaper form: two factors, or one matrix."""
        inputs, outputs = self.enter.shape[1], self.leave.shape[0]
        return int(min(rank * (inputs + outputs), inputs * outputs))

    def dense_at(self, rank: int) -> bool:
        """Whether one matrix is the cheaper form."""
        inputs, outputs = self.enter.shape[1], self.leave.shape[0]
        return bool(rank * (inputs + outputs) >= inputs * outputs)


class Factored(nn.Module):  # type: ignore[misc]
    """A layer made of the first `rank` components of `factors`; the bias is its own."""

    def __init__(self, factors: Factors, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.factors = factors
        self.rank = factors.components
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def enter(self) -> torch.Tensor:
        """[rank, inputs]"""
        return self.factors.enter[: self.rank]

    @property
    def leave(self) -> torch.Tensor:
        """[outputs, rank]"""
        return self.factors.leave[:, : self.rank]

    @property
    def dense(self) -> bool:
        return self.factors.dense_at(self.rank)

    def plain(self) -> nn.Module:
        """The same function of ordinary layers: one, or two where these are smaller. Shares no weights."""
        raise NotImplementedError


class FactoredLinear(Factored):
    """In place of a Linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense:
            return functional.linear(x, self.leave @ self.enter, self.bias)
        return functional.linear(functional.linear(x, self.enter), self.leave, self.bias)

    def plain(self) -> nn.Module:
        if self.dense:
            return _linear(self.leave @ self.enter, self.bias)
        return nn.Sequential(_linear(self.enter, None), _linear(self.leave, self.bias))


class FactoredConv(Factored):
    """In place of an ungrouped Conv2d layer: one of its kernel's size to `rank` channels, then one of 1x1."""

    def __init__(self, layer: nn.Conv2d, factors: Factors) -> None:
        super().__init__(factors, layer.bias)
        self.patch = tuple(layer.weight.shape[1:])
        self.window = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense:
            return functional.conv2d(x, (self.leave @ self.enter).view(-1, *self.patch), self.bias, **self.window)
        inner = functional.conv2d(x, self.enter.view(-1, *self.patch), None, **self.window)
        return functional.conv2d(inner, self.leave[:, :, None, None], self.bias)

    def plain(self) -> nn.Module:
        if self.dense:
            return _conv((self.leave @ self.enter).view(-1, *self.patch), self.bias, **self.window)
        return nn.Sequential(
            _conv(self.enter.reshape(-1, *self.patch), None, **self.window),
            _conv(self.leave[:, :, None, None], self.bias),
        )


def factorise(model: nn.Module, batches: Iterable[torch.Tensor], keep: Iterable[str] = ()) -> nn.Module:
    """A copy of `model` whose Linear and Conv2d layers are factored at full rank: it computes the same.

    `batches`: real inputs, a few hundred are enough. `keep`: names of modules that stay as they are with all
    below them. Grouped convolutions stay, and so does what PyTorch's own attention modules hold. Raises
    SettingsError for an unknown name in `keep`, a layer that no input reached, or when nothing is left.
    """
    model = copy.deepcopy(model)
    layers = dict(_factorable(model, tuple(keep)))
    if not layers:
        raise SettingsError("there is no Linear or ungrouped Conv2d layer to factor: shorten `keep`")
    moments = _second_moments(model, layers, batches)
    for name, layer in layers.items():
        factors = _factors(layer.weight.detach().flatten(1), moments[name])
        factored = FactoredConv(layer, factors) if isinstance(layer, nn.Conv2d) else FactoredLinear(factors, layer.bias)
        replace(model, name, factored)
    return model


def factored_layers(model: nn.Module) -> dict[str, Factored]:
    """By name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factored)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _factorable(model: nn.Module, keep: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    names = dict(model.named_modules())
    for name in keep:
        if name not in names:
            raise SettingsError(f"keep names {name!r}, the model has {', '.join(filter(None, names))}")
    kept = (*keep, *(name for name, module in names.items() if isinstance(module, OPAQUE)))
    for name, module in names.items():
        inside = any(name == outer or name.startswith(f"{outer}.") for outer in kept)
        # Not isinstance: a subclass may do something else with its weights.
        plain = type(module) is nn.Linear or (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if plain and not inside and name:
            yield name, module


def _second_moments(
    model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """E[x xᵀ] of what enters each layer, float64 [inputs, inputs]."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = _rows(layer, given[0].detach()).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    unseen = layers.keys() - sums.keys()
    if unseen:
        raise SettingsError(f"no input reached the layers {', '.join(sorted(unseen))}: name them in `keep`")
    return {name: total / counts[name] for name, total in sums.items()}


def _rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer's matrix is multiplied with: [rows, inputs]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    patches = functional.unfold(
        x, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _factors(matrix: torch.Tensor, moments: torch.Tensor) -> Factors:
    inputs = len(moments)
    damping = DAMPING * moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    lower = torch.linalg.cholesky(moments + damping * torch.eye(inputs, dtype=torch.float64))
    left, values, right = torch.linalg.svd(matrix.double() @ lower, full_matrices=False)
    root = values.sqrt()
    enter = torch.linalg.solve_triangular(lower, root[:, None] * right, upper=False, left=False)
    energy = values.square() / values.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Factors(enter.float(), (left * root).float(), energy.float())


def _linear(matrix: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    _fill(layer, matrix, bias)
    return layer


def _conv(weight: torch.Tensor, bias: torch.Tensor | None, **window: tuple[int, int]) -> nn.Conv2d:
    outputs, channels, *kernel = weight.shape
    layer = nn.Conv2d(channels, outputs, tuple(kernel), bias=bias is not None, **window)
    _fill(layer, weight, bias)
    return layer


def _fill(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
