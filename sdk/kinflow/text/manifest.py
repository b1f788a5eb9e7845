"""What stands in the `family.json` of a language model's bundle, as typed structs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from kinflow.manifest import File, Positive, PositiveFloat, Share, _Strict
from kinflow.messages import Name
from kinflow.ready import ready

TASK = "text-generation"
IDS = "ids"
"""Where the first segment begins: at token ids."""
LOWER, HEAD = "lower", "head"
"""The device's layers, and the LM head that every exit shares."""

Precision = Literal["float", "int8"]

MAX_CONTEXT = 1 << 15
MAX_VOCABULARY = 1 << 18
MAX_WIDTH = 1 << 14


class Graph(_Strict, frozen=True):
    """One segment at one precision. Inputs and outputs are float32 at any; docs/generation.md lists them."""

    file: File


class Segment(_Strict, frozen=True):
    """Consecutive decoder layers from ids, or a split, to the next split or an exit; or the head."""

    kind: Literal["trunk", "branch", "head"]
    source: Name
    """`ids`, a split, or for the head `hidden`."""
    result: Name
    """The split or exit it ends at; for the head `logits`."""
    layers: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    """Decoder layers, each with keys and values in the cache; the head has none."""
    graphs: Annotated[dict[Precision, Graph], msgspec.Meta(min_length=1)]
    macs: Positive
    """Per token, attention over the past apart."""
    parameters: Positive


class TokenCodec(_Strict, frozen=True):
    """One token's features <-> bytes (text/codec.py)."""

    kind: Literal["token-int8", "token-f16"]
    scale: tuple[PositiveFloat, ...] = ()
    """For `token-int8`: each channel's usual size, divided out before the token's own scale is taken."""


class Split(_Strict, frozen=True):
    """A point between two decoder layers where features may leave the machine."""

    after_layer: Positive
    codecs: Annotated[dict[Name, TokenCodec], msgspec.Meta(min_length=1)]
    """The first is the default one."""


class Certificate(_Strict, frozen=True):
    """P(risk at `threshold` <= epsilon) >= 1 - delta, from n calibration tokens.

    The risk is the share of all tokens that the exit is confident of and the last exit would have chosen otherwise.
    """

    threshold: Share
    epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    n: Positive
    kept_share: Share


class Exit(_Strict, frozen=True):
    """Where a token may leave."""

    segments: Annotated[list[Name], msgspec.Meta(min_length=1)]
    """What leads there, from the ids on; then comes the head."""
    temperature: PositiveFloat
    """Of its confidence. Sampling has a temperature of its own."""
    agreement: Share
    """Share of the positions of the largest member's own greedy texts where this exit chooses the same token."""
    perplexity: PositiveFloat
    certificate: Certificate | None = None


class Member(_Strict, frozen=True):
    segments: Annotated[list[Name], msgspec.Meta(min_length=1)]


@ready
class TextManifest(_Strict, frozen=True):
    schema: Literal[1]
    id: Name
    version: Name
    task: Literal["text-generation"]
    title: str
    license: str
    vocabulary: Annotated[int, msgspec.Meta(ge=2, le=MAX_VOCABULARY)]
    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_size: Annotated[int, msgspec.Meta(ge=2, le=1024)]
    context: Annotated[int, msgspec.Meta(ge=16, le=MAX_CONTEXT)]
    """Positions that a session may have."""
    tokenizer: File
    """tokenizer.json of the `tokenizers` library."""
    chat_template: File
    """A jinja2 template of `messages` and `add_generation_prompt`."""
    stop_tokens: Annotated[list[int], msgspec.Meta(min_length=1)]
    splits: Annotated[dict[Name, Split], msgspec.Meta(min_length=1)]
    segments: Annotated[dict[Name, Segment], msgspec.Meta(min_length=1)]
    exits: Annotated[dict[Name, Exit], msgspec.Meta(min_length=1)]
    """The earliest first; the last one is the largest member's."""
    members: Annotated[dict[Name, Member], msgspec.Meta(min_length=1)]
    margin_bound: Annotated[float, msgspec.Meta(ge=0)]
    """By how much coding features as float16 may move a logit (mode `exact`)."""

    def files(self) -> Iterator[File]:
        """Every file that the manifest names."""
        yield self.tokenizer
        yield self.chat_template
        for segment in self.segments.values():
            for graph in segment.graphs.values():
                yield graph.file

    def files_of(self, member: str) -> list[File]:
        """What this member needs, at every precision."""
        segments = [self.segments[name] for name in self.members[member].segments]
        graphs = [graph.file for segment in segments for graph in segment.graphs.values()]
        return [self.tokenizer, self.chat_template, *graphs]

    def last_exit(self) -> str:
        """The largest member's."""
        return list(self.exits)[-1]
