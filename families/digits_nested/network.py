"""A small vision transformer for 8x8 pixels: 2x2 patches, so 16 tokens. It knows nothing of families."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

LABELS = 10
TOKENS = 16
# A convolution before the patches: with a thousand images, attention alone learns neighbourhood slowly.
STEM = 16


class Patches(nn.Module):  # type: ignore[misc]
    """Image -> tokens [n, tokens, width], each with its place added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(1, STEM, 3, 1, 1), nn.GELU(), nn.Conv2d(STEM, width, 2, 2))
        self.places = nn.Parameter(torch.randn(TOKENS, width) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.places


class Attention(nn.Module):  # type: ignore[misc]
    """Self-attention of all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.mix(functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Block(nn.Module):  # type: ignore[misc]
    """Attention, then two layers on each token alone; both beside an identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Head(nn.Module):  # type: ignore[misc]
    """Mean of the tokens, then one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x).mean(1))


def make(width: int, heads: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Patches(width), *(Block(width, heads) for _ in range(blocks)), Head(width))
