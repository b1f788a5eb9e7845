"""A Llama-style causal language model in plain torch: rotary positions, grouped queries, gated MLPs, RMS norms.

Attention takes its past and its mask from the caller, as the bundle's graphs do; nothing here holds a cache.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kinflow_builder.narrow import narrow
from kinflow_builder.text.shape import LAYER, Branch, Bridge, Floats, Model, Shape, Weights


class Norm(nn.Module):  # type: ignore[misc]
    """Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)
        return hidden * scale * self.weight


class Layer(nn.Module):  # type: ignore[misc]
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, size = shape.width, shape.head_size
        self.attention_norm = Norm(width, shape.epsilon)
        self.query = nn.Linear(width, shape.heads * size, bias=False)
        self.key = nn.Linear(width, shape.kv_heads * size, bias=False)
        self.value = nn.Linear(width, shape.kv_heads * size, bias=False)
        self.output = nn.Linear(shape.heads * size, width, bias=False)
        self.mlp_norm = Norm(width, shape.epsilon)
        self.gate = nn.Linear(width, shape.inner, bias=False)
        self.up = nn.Linear(width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, width, bias=False)

    def forward(
        self, hidden: torch.Tensor, past: torch.Tensor, bias: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [B,T,d], past [B,P,2,H,D], bias [B,1,T,P+T] -> hidden [B,T,d], new cache entries [B,T,2,H,D]."""
        normed = self.attention_norm(hidden)
        size = self.shape.head_size
        query, key, value = (linear(normed).unflatten(-1, (-1, size)) for linear in (self.query, self.key, self.value))
        present = torch.stack([rotated(key, turn), value], 2)
        mixed = attend(rotated(query, turn), torch.cat([past, present], 1), bias)
        hidden = hidden + self.output(mixed)
        normed = self.mlp_norm(hidden)
        return hidden + self.down(functional.silu(self.gate(normed)) * self.up(normed)), present


def attend(query: torch.Tensor, cache: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """query [B,T,heads,D], cache [B,S,2,H,D], bias [B,1,T,S] -> [B,T,heads*D].

    The queries that share a key stand one behind another, so that no key is copied.
    """
    keys, values = cache[:, :, 0].transpose(1, 2), cache[:, :, 1].transpose(1, 2)  # [B,H,S,D]
    groups = query.shape[2] // keys.shape[1]
    tokens = query.shape[1]
    grouped = query.transpose(1, 2).unflatten(1, (-1, groups)).flatten(2, 3)  # [B,H,groups*T,D]
    scores = grouped @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = torch.softmax(scores.unflatten(2, (groups, tokens)) + bias.unsqueeze(1), -1)
    mixed = weights.flatten(2, 3) @ values
    return mixed.unflatten(2, (groups, tokens)).flatten(1, 2).transpose(1, 2).flatten(2)


def rotary(shape: Shape, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B,T,1,D] of the positions' angles (Su et al., RoFormer, arXiv 2104.09864); halves are paired."""
    steps = torch.arange(0, shape.head_size, 2, dtype=torch.float32, device=positions.device) / shape.head_size
    angles = positions.float().unsqueeze(-1) * torch.pow(shape.theta, -steps)
    angles = torch.cat([angles, angles], -1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotated(vectors: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """vectors [B,T,heads,D], turned by their positions."""
    cosine, sine = turn
    first, second = vectors.chunk(2, -1)
    return vectors * cosine + torch.cat([-second, first], -1) * sine


class Stack(nn.Module):  # type: ignore[misc]
    """Consecutive layers, in a branch behind a bridge, and at an exit its norm: every segment but the head."""

    def __init__(
        self, shape: Shape, layers: list[Layer], norm: Norm | None = None, bridge: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.bridge = nn.Identity() if bridge is None else bridge
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if norm is None else norm

    def forward(
        self, hidden: torch.Tensor, past: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [B,T,d], past [B,P,L,2,H,D], positions [B,T], bias [B,1,T,P+T] -> hidden, present [B,T,L,2,H,D]."""
        turn = rotary(self.shape, positions)
        hidden = self.bridge(hidden)
        presents = []
        for index, layer in enumerate(self.layers):
            hidden, present = layer(hidden, past[:, :, index], bias, turn)
            presents.append(present)
        return self.norm(hidden), torch.stack(presents, 2)


class Llama(nn.Module):  # type: ignore[misc]
    """The whole model, frozen. `head` is a matrix [vocabulary, width]; where it is tied it is the embedding's own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.shape = model.shape
        self.source = model
        self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(model.embedding))
        self.layers = nn.ModuleList([layer_of(model.shape, weights) for weights in model.layers])
        self.norm = norm_of(model.shape, model.norm)
        tied = model.head is model.embedding
        self.head = self.embedding.weight if tied else nn.Parameter(torch.from_numpy(model.head))
        self.eval().requires_grad_(False)

    def part(self, begin: int, end: int) -> Stack:
        """Layers begin…end-1, the very same ones; the last part carries the final norm."""
        return Stack(self.shape, list(self.layers[begin:end]), self.norm if end == len(self.layers) else None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B,T] of whole texts -> logits [B,T,vocabulary]."""
        hidden, _ = whole(self.part(0, len(self.layers)), self.embedding(ids))
        return functional.linear(hidden, self.head)


def narrowed(llama: Llama) -> Llama:
    """The same model, its matrices rounded to bfloat16 where `narrow` says so; embedding and norms stay as they are."""
    if narrow(llama.head.device):
        for module in llama.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
        llama.head = nn.Parameter(llama.head.bfloat16(), requires_grad=False)
    return llama


def layer_of(shape: Shape, weights: Weights) -> Layer:
    """A layer with these weights, copied."""
    layer = Layer(shape)
    layer.load_state_dict({f"{name}.weight": torch.tensor(value) for name, value in weights.items()})
    return layer


def norm_of(shape: Shape, weight: Floats) -> Norm:
    norm = Norm(shape.width, shape.epsilon)
    norm.load_state_dict({"weight": torch.tensor(weight)})
    return norm


def stack_of(shape: Shape, branch: Branch) -> Stack:
    """A branch as a module, to train it."""
    bridge = None
    if branch.bridge is not None:
        bridge = nn.Linear(shape.width, shape.width)
        bridge.load_state_dict({name: torch.tensor(value) for name, value in vars(branch.bridge).items()})
    return Stack(shape, [layer_of(shape, layer) for layer in branch.layers], norm_of(shape, branch.norm), bridge)


def branch_of(stack: Stack) -> Branch:
    """`stack_of`, backwards."""
    layers = [{name: _values(getattr(layer, name).weight) for name in LAYER} for layer in stack.layers]
    bridge = None
    if isinstance(stack.bridge, nn.Linear):
        bridge = Bridge(_values(stack.bridge.weight), _values(stack.bridge.bias))
    return Branch(layers, _values(stack.norm.weight), bridge)


def _values(parameter: torch.Tensor) -> Floats:
    return np.array(parameter.detach().cpu().numpy())


def whole(stack: Stack, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`stack` over texts from their beginning, without a past."""
    batch, tokens = hidden.shape[:2]
    shape = stack.shape
    past = hidden.new_zeros(batch, 0, len(stack.layers), 2, shape.kv_heads, shape.head_size)
    positions = torch.arange(tokens, device=hidden.device).expand(batch, tokens)
    result, present = stack(hidden, past, positions, causal(tokens, hidden.device))
    return result, present


def causal(tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """bias [1,1,tokens,tokens]: every token sees itself and what is before it."""
    return torch.full((tokens, tokens), -1e9, device=device).triu(1)[None, None]
