"""Nested low rank: one set of factors, members of any size cut out of it (way three of aligning a family).

All components of all layers stand in one order, the one that gives most energy per parameter first. A member is
a beginning of that order, so a smaller member's factors are a prefix of a larger one's, in every layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder.factors import Factored, Factors, factored_layers, replace

Ranks = dict[str, int]
"""Of every factored layer, by its name in the model."""


@dataclass(frozen=True)
class Step:
    """The next part of the order: `layer` grows to `rank`."""

    layer: str
    rank: int


def order(model: nn.Module) -> list[Step]:
    """How the smallest member (rank 1 everywhere) grows to the whole of a factored `model`.

    Greedy: the step with the most energy per parameter comes first. Past the rank at which one matrix is
    smaller than two factors, the rest of a layer is a single step. A layer's energies are shares of its own
    outputs', so that layers of different scales can be compared.
    """
    layers = {name: layer.factors for name, layer in factored_layers(model).items()}
    waiting = {name: _next(factors, 1) for name, factors in layers.items() if factors.components > 1}
    steps = []
    while waiting:
        best = max(waiting, key=lambda name: waiting[name].energy_per_parameter)
        rank = waiting.pop(best).rank
        steps.append(Step(best, rank))
        if rank < layers[best].components:
            waiting[best] = _next(layers[best], rank)
    return steps


class _Growth(NamedTuple):
    """A layer's next step: the rank after it, and what it brings."""

    rank: int
    energy_per_parameter: float


def _next(factors: Factors, rank: int) -> _Growth:
    reached = factors.components if factors.dense_at(rank + 1) else rank + 1
    energy = float(factors.energy[rank:reached].sum())
    return _Growth(reached, energy / max(1, factors.parameters_at(reached) - factors.parameters_at(rank)))


def full(model: nn.Module) -> Ranks:
    """The largest member's ranks."""
    return {name: layer.factors.components for name, layer in factored_layers(model).items()}


def parameters(model: nn.Module) -> float:
    """Their number; the usual measure of `fit`."""
    return float(sum(parameter.numel() for parameter in model.parameters()))


def fit(model: nn.Module, limit: float, measure: Callable[[nn.Module], float] = parameters) -> Ranks:
    """Ranks of the largest member with `measure(member) <= limit`.

    `measure` gets a member of ordinary layers and gives its size: parameters, or for example the seconds that an
    image takes (budget.py). It should grow with the ranks; it is called about eight times. Raises SettingsError when
    even rank 1 in every layer is too much.
    """
    steps = order(model)
    least = dict.fromkeys(factored_layers(model), 1)
    size = measure(cut(model, least))
    if size > limit:
        raise SettingsError(f"rank 1 in every layer, the smallest member, measures {size:.4g}: over {limit:.4g}")

    def after(count: int) -> Ranks:
        return {**least, **{step.layer: step.rank for step in steps[:count]}}

    fits, too_many = 0, len(steps) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if measure(cut(model, after(middle))) <= limit:
            fits = middle
        else:
            too_many = middle
    return after(fits)


def cut(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The member with these ranks, of ordinary layers, sharing nothing with `model`."""
    return plain(prefix(model, ranks))


def prefix(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The member with these ranks; its factors are `model`'s own, all else is a copy.

    Norms, biases and heads are small and depend on how much of a layer there is: each member has its own.
    Raises SettingsError when the ranks are not this model's.
    """
    layers = factored_layers(model)
    if ranks.keys() != layers.keys():
        raise SettingsError(f"ranks are given for {sorted(ranks)}, the factored layers are {sorted(layers)}")
    shared = {id(layer.factors): layer.factors for layer in layers.values()}
    member = copy.deepcopy(model, shared)
    for name, layer in factored_layers(member).items():
        if not 1 <= ranks[name] <= layer.factors.components:
            raise SettingsError(f"{name}: rank {ranks[name]} is not between 1 and {layer.factors.components}")
        layer.rank = ranks[name]
    return member


def plain(model: nn.Module) -> nn.Module:
    """A copy with ordinary layers in place of the factored ones: what is exported."""
    if isinstance(model, Factored):
        return model.plain()
    model = copy.deepcopy(model)
    for name, layer in factored_layers(model).items():
        replace(model, name, layer.plain())
    return model
