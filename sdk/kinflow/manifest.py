"""What stands in a bundle's `family.json`, as typed structs. Unknown keys are errors: a typo must not pass."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kinflow.messages import Name
from kinflow.ready import ready

SCHEMA = 1
BackendName = Literal["onnx", "tflite"]
# Weights and arithmetic in floats; weights in 16, 8 or 6 bits, arithmetic in floats; both in 8 bits.
Precision = Literal["float", "half", "weights8", "weights6", "int8"]

# What a manifest may ask for at the most: it is read before anything else is known of whoever wrote it.
MAX_FILE_BYTES = 1 << 31
MAX_SIDE = 1 << 14
MAX_FEATURES = 1 << 24

Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all below."""


class File(_Strict, frozen=True):
    """One file of the bundle; `path` is relative to the folder and may not leave it."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_FILE_BYTES)]


class Tensor(_Strict, frozen=True):
    """A graph's input or output: float32, shape without the batch axis."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    shape: list[Positive]


class Graph(_Strict, frozen=True):
    """One segment for one backend. Outputs stand in the graph's own order."""

    file: File
    input: Tensor
    outputs: Annotated[list[Tensor], msgspec.Meta(min_length=1, max_length=2)]
    dynamic_batch: bool
    """False: the graph takes exactly one item (TFLite)."""
    precision: Precision | None = None
    """How weights are stored and computed with; None: not stated."""


class Segment(_Strict, frozen=True):
    """Consecutive layers, from the input or a split to the next split, an exit, or both."""

    source: Name
    """`input`, or the split whose features it takes."""
    split: Name | None
    """The split it ends at: its graph then has the output `features`."""
    exit: Name | None
    """The exit whose branch and head it carries: its graph then has the output `logits`."""
    graphs: dict[BackendName, Graph]
    macs: Positive
    parameters: Positive


class Merge(_Strict, frozen=True):
    """How the tokens of one item are merged before they are coded (tokens.py)."""

    clusters: Positive
    """Tokens that are left."""
    neighbours: Positive
    """Nearest tokens that a token's density is taken from."""


Context = Literal["channel", "position"]


class Codec(_Strict, frozen=True):
    """Features <-> bytes at one split (codec.py, tokens.py). `kind` decides what the other fields mean."""

    kind: Literal["uniform", "uniform-rans", "token-merge"]
    bits: Literal[4, 8]
    step: Annotated[list[PositiveFloat], msgspec.Meta(min_length=1)]
    """Quantisation step per channel."""
    zero: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=255)]], msgspec.Meta(min_length=1)]
    """The level that stands for 0.0, per channel."""
    table: File | None
    """For `uniform-rans` and `token-merge`: uint16 little-endian frequencies under zlib.

    A row per context, each sums to 2**14.
    """
    bytes_mean: Annotated[float, msgspec.Meta(gt=0)]
    """Mean coded size on the calibration images."""
    context: Context = "channel"
    """Which symbols share a row of the table: a channel's, [channels, 256], or none, [symbols, 256]."""
    merge: Merge | None = None
    """For `token-merge` alone."""


class Split(_Strict, frozen=True):
    """A point between two segments where features may leave the machine."""

    shape: Annotated[list[Positive], msgspec.Meta(min_length=3, max_length=3)]
    """[channels, height, width]"""
    codecs: Annotated[dict[Name, Codec], msgspec.Meta(min_length=1)]
    default_codec: Name


class Certificate(_Strict, frozen=True):
    """P(risk at `threshold` <= epsilon) >= 1 - delta, from n calibration samples.

    The risk is the share of all images whose answer is kept and is a loss. Gap: it is wrong where the last
    exit is right. Consistency: it differs from the last exit's.
    """

    threshold: Share
    epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    n: Positive
    risk: Literal["gap", "consistency"]
    kept_share: Share
    """Share of the calibration samples that the threshold keeps."""
    data_sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class Exit(_Strict, frozen=True):
    """Where an answer may leave, and how sure it must be."""

    temperature: PositiveFloat
    threshold: Share
    """Keep the answer at this confidence or above; 0 at the last exit."""
    accuracy: Share
    """Top-1 on the test images, features coded on the way as in service."""
    certificate: Certificate | None = None


class Member(_Strict, frozen=True):
    """One runnable size of the family: its segments in order, from the input on."""

    segments: Annotated[list[Name], msgspec.Meta(min_length=1)]


class Preprocess(_Strict, frozen=True):
    """image -> float32 [1, channels, height, width]: (pixel / 255 - mean) / std per channel."""

    mode: Literal["L", "RGB"]
    height: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
    mean: list[float]
    std: list[PositiveFloat]
    resize: Literal["stretch", "crop"]
    """How a file of another size is fitted: stretched, or shorter side scaled and the centre cut out."""


@ready
class Manifest(_Strict, frozen=True):
    schema: Literal[1]
    id: Name
    version: Name
    task: Literal["image-classification"]
    title: str
    license: str
    labels: Annotated[list[str], msgspec.Meta(min_length=2)]
    preprocess: Preprocess
    splits: dict[Name, Split]
    segments: Annotated[dict[Name, Segment], msgspec.Meta(min_length=1)]
    exits: Annotated[dict[Name, Exit], msgspec.Meta(min_length=1)]
    members: Annotated[dict[Name, Member], msgspec.Meta(min_length=1)]

    def files_of(self, member: str, backend: BackendName) -> list[File]:
        """What a device needs to run `member` on `backend` and to offload: its graphs, its splits' tables."""
        segments = [self.segments[name] for name in self.members[member].segments]
        graphs = [segment.graphs[backend].file for segment in segments if backend in segment.graphs]
        splits = [self.splits[segment.split] for segment in segments if segment.split is not None]
        tables = [codec.table for split in splits for codec in split.codecs.values()]
        return graphs + [table for table in tables if table is not None]

    def files(self) -> list[File]:
        """Every file that the manifest names."""
        graphs = [graph.file for segment in self.segments.values() for graph in segment.graphs.values()]
        codecs = [codec for split in self.splits.values() for codec in split.codecs.values()]
        return graphs + [codec.table for codec in codecs if codec.table is not None]
