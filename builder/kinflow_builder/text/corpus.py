"""Training texts that need no data: the model converses with itself, and what its layers made of it is kept.

The model is given the beginning of a conversation and writes the question too (Xu et al., "Magpie", arXiv 2406.08464),
or some words of a question that the recipe has, or a random word and writes a text. Half of the answers are greedy.
All texts of a batch go ahead in step, each at its own temperature, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional

from kinflow_builder.text.llama import Llama, Norm, rotary, rotated

# Of the head's rows for each token, the ones that matter.
LIKELY = 16
# Questions end by themselves, as a rule.
MOST_QUESTION_TOKENS = 48
# Positions that a cache grows by.
BLOCK = 64
# The temperature of questions.
LIVELY = 0.85


@dataclass(frozen=True)
class Frame:
    """How a conversation is written down, as token ids between what user and assistant say."""

    opening: list[int]
    to_answer: list[int]
    to_question: list[int]
    stop: frozenset[int]


@dataclass
class Speaker:
    """One text as it grows: what must come next, and who is speaking."""

    forced: list[int]
    frame: Frame | None
    """None: a free text."""
    temperature: float
    """Of the answers, or of the free text."""
    asking: bool = True
    said: int = field(default=0, init=False)

    @property
    def heat(self) -> float:
        return LIVELY if self.frame is not None and self.asking else self.temperature

    def next(self, proposed: int) -> int:
        """The token that really follows, given what the model would say."""
        if self.forced:
            return self.forced.pop(0)
        if self.frame is None:
            return proposed
        self.said += 1
        stopped = proposed in self.frame.stop
        if not stopped and not (self.asking and self.said > MOST_QUESTION_TOKENS):
            return proposed
        self.forced = list(self.frame.to_answer if self.asking else self.frame.to_question)
        self.asking, self.said = not self.asking, 0
        return self.forced.pop(0)


class Written(NamedTuple):
    """A batch of texts and the hidden values that the model had on the way."""

    ids: torch.Tensor
    """int32 [texts, tokens]"""
    features: dict[int, torch.Tensor]
    """float16 [texts, tokens, width] after so many layers."""
    final: torch.Tensor
    """float16 [texts, tokens, width], normed: the head makes the teacher's logits of it."""
    likely: torch.Tensor
    """int32 [texts, tokens, LIKELY]: the likeliest next tokens."""
    own: torch.Tensor
    """bool [texts, tokens]: the token is the model's greedy choice in an answer."""


class Memory:
    """The caches of a batch, in whole blocks of positions: matrices without gaps multiply several times as fast."""

    def __init__(self, model: Llama, batch: int) -> None:
        shape, head = model.shape, model.head
        size = (shape.layers, 2, batch, shape.kv_heads, BLOCK, shape.head_size)
        self.cells = torch.zeros(size, device=head.device, dtype=head.dtype)
        self.bias = torch.empty(0, device=head.device)
        """[positions]: hides those that are still to come."""

    def reach(self, place: int) -> None:
        """Make room for position `place`, and show it."""
        if place >= self.cells.shape[4]:
            self.cells = functional.pad(self.cells, (0, 0, 0, BLOCK))
        self.bias = torch.zeros(self.cells.shape[4], device=self.cells.device)
        self.bias[place + 1 :] = -torch.inf


@torch.inference_mode()  # type: ignore[untyped-decorator]
def converse(
    model: Llama, speakers: list[Speaker], tokens: int, layers: list[int], seed: int, done: Callable[[], None]
) -> Written:
    """A text of `tokens` tokens from each speaker; `layers`: after which hidden values are kept.

    The model's matrices may be `narrowed`.
    """
    device, width = model.head.device, model.shape.width
    count = len(speakers)
    random = torch.Generator(device).manual_seed(seed)
    memory = Memory(model, count)
    kept = {layer: torch.empty(count, tokens, width, dtype=torch.float16) for layer in layers}
    final = torch.empty(count, tokens, width, dtype=torch.float16)
    likely = torch.empty(count, tokens, LIKELY, dtype=torch.int32)
    ids = torch.empty(count, tokens, dtype=torch.int32)
    own = torch.zeros(count, tokens, dtype=torch.bool)
    following = [speaker.next(0) for speaker in speakers]
    for place in range(tokens):
        ids[:, place] = torch.tensor(following)
        hidden = _step(model, memory, ids[:, place].to(device), place, kept)
        final[:, place] = hidden.half()
        logits = functional.linear(hidden.to(model.head.dtype), model.head).float()
        likely[:, place] = logits.topk(LIKELY).indices
        heats = torch.tensor([speaker.heat for speaker in speakers], device=device)
        proposed = _sampled(logits, heats, random).tolist()
        greedy = [not speaker.forced and speaker.heat == 0 for speaker in speakers]
        following = [speaker.next(token) for speaker, token in zip(speakers, proposed, strict=True)]
        if place + 1 < tokens:
            same = [a == b for a, b in zip(following, proposed, strict=True)]
            own[:, place + 1] = torch.tensor(greedy) & torch.tensor(same)
        done()
    return Written(ids, kept, final, likely, own)


def _step(model: Llama, memory: Memory, ids: torch.Tensor, place: int, kept: dict[int, torch.Tensor]) -> torch.Tensor:
    """ids [B] at position `place` -> normed hidden values [B,width]."""
    hidden, kind = model.embedding(ids), model.head.dtype
    memory.reach(place)
    turn = rotary(model.shape, torch.full((1, 1), place, device=ids.device))
    for number, layer in enumerate(model.layers):
        normed = layer.attention_norm(hidden).to(kind)
        size = model.shape.head_size
        query, key, value = (
            linear(normed).float().unflatten(-1, (-1, size)) for linear in (layer.query, layer.key, layer.value)
        )
        keys, values = memory.cells[number]
        keys[:, :, place] = rotated(key[:, None], turn)[:, 0]
        values[:, :, place] = value
        query = rotated(query[:, None], turn)[:, 0].unflatten(1, (keys.shape[1], -1))
        scores = (query.to(kind) @ keys.transpose(2, 3)).float() * size**-0.5
        mixed = torch.softmax(scores + memory.bias, -1).to(kind) @ values
        hidden = hidden + layer.output(mixed.flatten(1))
        normed = layer.mlp_norm(hidden).to(kind)
        hidden = hidden + layer.down(functional.silu(layer.gate(normed)) * layer.up(normed))
        if number + 1 in kept:
            kept[number + 1][:, place] = hidden.half()
    norm: Norm = model.norm
    normed_last: torch.Tensor = norm(hidden)
    return normed_last


def _sampled(logits: torch.Tensor, heats: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """One token of each row, at its own temperature; 0: the likeliest."""
    greedy = logits.argmax(-1)
    scaled = torch.softmax(logits / heats.clamp_min(1e-3)[:, None], -1).cumsum_(-1)
    # Where a uniform number falls in the running sum: far cheaper than noise for each of 49,000 tokens.
    place = torch.rand(len(heats), 1, generator=random, device=logits.device) * scaled[:, -1:]
    drawn = torch.searchsorted(scaled, place, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
    return torch.where(heats > 0, drawn, greedy)
