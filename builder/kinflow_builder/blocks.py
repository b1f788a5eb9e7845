"""A model of anybody's -> an ordered list of blocks, each taking the one tensor that the block before gives.

What has an order already (nn.Sequential, a list) is taken as it is. Everything else is traced with torch.fx and cut
wherever a single tensor is all that what follows needs: after a residual block, never inside one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from kinflow.errors import SettingsError


@dataclass(frozen=True)
class Block:
    """`name`: where it stands in the model, `layer2.1`; what `splits` of a recipe are chosen by."""

    name: str
    module: nn.Module


def blocks_of(model: nn.Module | Sequence[nn.Module], example: torch.Tensor) -> list[Block]:
    """`example`: an input, float32 [1, channels, height, width].

    Raises SettingsError that names the model and the way out where it can be neither taken apart nor traced, or
    where its blocks do not give what the model gives.
    """
    if isinstance(model, nn.Module) and not isinstance(model, nn.Sequential):
        whole: nn.Module = model
        blocks = _traced(model, example)
    else:
        blocks = _flat("", model.named_children() if isinstance(model, nn.Module) else _numbered(model))
        whole = nn.Sequential(*(block.module for block in blocks))
    if len(blocks) < 2:
        raise SettingsError(f"{_kind(whole)} is one piece: give it as nn.Sequential of its blocks, in order")
    with torch.no_grad():
        expected, found = whole.eval()(example), example
        for block in blocks:
            try:
                found = block.module.eval()(found)
            except (RuntimeError, TypeError) as exc:
                shape = list(getattr(found, "shape", []))
                raise SettingsError(f"block {block.name!r} of {_kind(whole)} refuses {shape}: {exc}") from exc
    if not (isinstance(expected, torch.Tensor) and torch.allclose(found, expected, atol=1e-4, rtol=1e-3)):
        raise SettingsError(
            f"the blocks of {_kind(whole)} do not compute what it does: give it as nn.Sequential of its blocks"
        )
    return blocks


def last_of(blocks: Sequence[Block], name: str) -> int:
    """The index of the block with which `name` ends: the block itself, or the module that holds it.

    Raises SettingsError that lists the names.
    """
    found = [i for i, block in enumerate(blocks) if block.name == name or block.name.startswith(f"{name}.")]
    if not found:
        raise SettingsError(f"no block is called {name!r}, there are {', '.join(block.name for block in blocks)}")
    return found[-1]


def _numbered(modules: Sequence[nn.Module]) -> Iterable[tuple[str, nn.Module]]:
    return ((str(index), module) for index, module in enumerate(modules))


def _flat(prefix: str, children: Iterable[tuple[str, nn.Module]]) -> list[Block]:
    """nn.Sequential within nn.Sequential is the same order, in smaller steps."""
    blocks = []
    for name, child in children:
        if type(child) is nn.Sequential:
            blocks += _flat(f"{prefix}{name}.", child.named_children())
        else:
            blocks.append(Block(f"{prefix}{name}", child))
    return _joined(blocks)


def _joined(blocks: list[Block]) -> list[Block]:
    """Layers without weights, such as an activation, belong to the block before."""
    joined: list[Block] = []
    for block in blocks:
        if joined and not any(parameter.ndim > 1 for parameter in block.module.parameters()):
            joined[-1] = Block(joined[-1].name, nn.Sequential(joined[-1].module, block.module))
        else:
            joined.append(block)
    return joined


def _traced(model: nn.Module, example: torch.Tensor) -> list[Block]:
    # Options of forward() have their defaults: an optional mask is then no second input that lives all the way.
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    try:
        traced = fx.symbolic_trace(model.eval(), concrete_args=defaults)
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception as exc:  # whatever the model's own code raises when it is fed with proxies
        raise SettingsError(
            f"{_kind(model)} cannot be traced by torch.fx ({exc}): give it as nn.Sequential of its blocks, in order"
        ) from exc
    source = next(node for node in traced.graph.nodes if node.op == "placeholder")
    blocks, taken = [], set()
    for cut in _cuts(traced):
        part = _between(traced, source, cut)
        name = _place(cut)
        # Two cuts in the same place: the functional layers after it have no name of their own.
        name = name if name not in taken else f"{name}.{cut.name}"
        taken.add(name)
        blocks.append(Block(name, part))
        source = cut
    return _joined(blocks)


def _cuts(traced: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose value, a tensor, is all that the nodes after them need; the model's result is the last one."""
    nodes = [node for node in traced.graph.nodes if node.op not in ("get_attr", "output")]
    order = {node: index for index, node in enumerate(nodes)}
    # Weights and constants are no state: any part may read them again. The result outlives all nodes.
    last_use = [max((order.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes]
    cuts = []
    for index, node in enumerate(nodes):
        alive = [use for use in last_use[: index + 1] if use > index]
        alone = len(alive) == 1 and last_use[index] > index
        if alone and node.op != "placeholder" and isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            cuts.append(node)
    return cuts


def _between(traced: fx.GraphModule, source: fx.Node, cut: fx.Node) -> fx.GraphModule:
    """What computes `cut` from `source`, as a module of its own."""
    graph = fx.Graph()
    known = {source: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in known:
            known[node] = graph.node_copy(node, copied)
        return known[node]

    needed: set[fx.Node] = set()
    waiting = [cut]
    while waiting:
        node = waiting.pop()
        if node not in needed and node is not source:
            needed.add(node)
            waiting += node.all_input_nodes
    # In the order of the trace: node_copy then never recurses deeper than to a weight.
    for node in traced.graph.nodes:
        if node in needed:
            copied(node)
    graph.output(known[cut])
    return fx.GraphModule(traced, graph)


def _place(node: fx.Node) -> str:
    """The module that the node was traced in: `layer2.1` for the addition at its end."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else node.name


def _kind(model: nn.Module) -> str:
    return type(model).__name__
