"""The dataclasses that travel: what stands in a frame's header (docs/protocol.md tells the same in prose).

On the wire a struct is an array: its tag, then its fields in the order below. Keys would cost more than the values,
and a feature is often smaller than its header. A later minor version may append fields: what is too many is ignored,
what is missing has its default.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Tier = Literal["device", "edge", "cloud"]
State = Literal["ready", "failing", "draining", "offline"]
RequestId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=512)]
# Bounded: an infinite time would pass through every comparison and break timers.
NonNegative = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
MAX_DEADLINE_MS = 3_600_000
# A verification of more drafts than this would be computed for nothing: not even a sure device is right so often.
MAX_DRAFTS = 256
SessionId = RequestId
Position = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """What one server spent on a request, in milliseconds, and the bytes it sent further up."""

    node: Name
    tier: Tier
    decode_ms: NonNegative
    queue_ms: NonNegative
    compute_ms: NonNegative
    total_ms: NonNegative
    bytes_up: Annotated[int, msgspec.Meta(ge=0)] = 0


class Request(msgspec.Struct, frozen=True, tag="request", array_like=True):
    """Continue this computation. The payload holds the features, coded by `codec`."""

    id: RequestId
    client: Name
    """Who asks: replies go to its reply topic, and to no other."""
    family: Name
    version: Name
    split: Name
    codec: Name
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_MS)]
    """What is left of the deadline when this was sent: clocks need not agree."""


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True):
    """The answer of one exit. The payload is empty."""

    id: RequestId
    label: Annotated[int, msgspec.Meta(ge=0)]
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)]
    tier: Tier
    exit: Name
    degraded: bool = False
    """True when this tier wanted to escalate and could not; `reason` says why."""
    reason: Text = ""
    hops: list[Hop] = []
    """The servers that worked on it, nearest first."""


class Verify(msgspec.Struct, frozen=True, tag="verify", array_like=True):
    """Append these positions to a session, and say which of the drafted tokens stand and what comes after them.

    The payload holds `count` token ids, uint32 little-endian, those of the positions from `start` on, then, unless the
    codec is `ids`, the features of the same positions. start <= confirmed <= start + count.
    """

    id: RequestId
    client: Name
    family: Name
    version: Name
    split: Name
    """Where the features were taken; `ids`: there are none, the server computes all layers."""
    codec: Name
    session: SessionId
    """The client's own name for a generation: the server keeps its attention cache."""
    start: Position
    """What the session has from here on is cropped first; 0 opens it."""
    confirmed: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    """Tokens of positions from here on are drafts."""
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    exit: Name
    """Whose token is wanted."""
    exact: bool
    """Redo from token ids what the coding of the features could have decided."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)]
    """0: the most probable token."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)]
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    """Of the noise that device and servers share."""
    deadline_ms: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_MS)]
    """What is left of the deadline when this was sent."""
    follows: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None = None
    """Not None: the verification before it, which ended at `start` with drafts, had no verdict yet when this was sent.

    Then CRC-32 of all token ids before `start`: where the session holds others, this is refused and changes nothing.
    """


class Verdict(msgspec.Struct, frozen=True, tag="verdict", array_like=True):
    """What became of the drafts of one Verify. The payload is empty."""

    id: RequestId
    accepted: Annotated[int, msgspec.Meta(ge=0, le=MAX_DRAFTS)]
    """Drafts that stand, from the first one on. The session holds what was confirmed and these."""
    token: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    """The server's own token after them; the session does not hold it yet."""
    probabilities: Annotated[list[Probability], msgspec.Meta(max_length=MAX_DRAFTS + 1)]
    """The server's, of the accepted drafts and of `token`."""
    tier: Tier
    exit: Name
    node: Name
    redone: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Positions decided from token ids."""
    degraded: bool = False
    """True when another exit than the one asked for decided; `reason` says why."""
    reason: Text = ""
    hops: list[Hop] = []
    """The servers that worked on it, nearest first."""
    layer_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Layers times positions that all of them computed for it."""
    passes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Forward passes of all of them; one that was shared with others counts whole."""


class Release(msgspec.Struct, frozen=True, tag="release", array_like=True):
    """A generation has ended: forget its session. Not answered."""

    id: RequestId
    client: Name
    """Whose session it is: nobody else may release it."""
    session: SessionId


class Busy(msgspec.Struct, frozen=True, tag="busy", array_like=True):
    """The queue would miss the deadline: answer locally, now."""

    id: RequestId
    node: Name
    queue_ms: NonNegative


class Failure(msgspec.Struct, frozen=True, tag="failure", array_like=True):
    """The request could not be served; `code` is one of errors.py's."""

    id: RequestId
    node: Name
    code: Annotated[str, msgspec.Meta(max_length=32)]
    message: Text


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """The reply to this request is not wanted any more: another node was faster. Not answered."""

    id: RequestId
    client: Name
    """Who asked: nobody else may cancel."""


class Probe(msgspec.Struct, frozen=True, tag="probe", array_like=True):
    """Is this node there, and how far away? The payload is filling, so that the throughput shows."""

    id: RequestId
    client: Name


class Echo(msgspec.Struct, frozen=True, tag="echo", array_like=True):
    """The answer to a probe, past the queue. The payload is empty."""

    id: RequestId
    node: Name
    queue_ms: NonNegative


class Fetch(msgspec.Struct, frozen=True, tag="fetch", array_like=True):
    """Send a part of a file of this family's bundle."""

    id: RequestId
    client: Name
    """Who asks: the part goes to its reply topic."""
    family: Name
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    """As in family.json; family.json itself and family.sig can be asked for too."""
    offset: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    length: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Part(msgspec.Struct, frozen=True, tag="part", array_like=True):
    """A part of a file. The payload holds its bytes; none behind the file's end."""

    id: RequestId
    node: Name
    total_bytes: Annotated[int, msgspec.Meta(ge=0)]
    """Size of the whole file."""


class Served(msgspec.Struct, frozen=True, array_like=True):
    """One family that a node serves: the splits it takes and the codecs it can decode there."""

    family: Name
    version: Name
    splits: dict[Name, list[Name]]


class NodeStatus(msgspec.Struct, frozen=True, tag="status", array_like=True):
    """Retained by every server on its status topic; its last will says `offline`."""

    node: Name
    tier: Tier
    state: State
    """Only a ready one is asked. Failing: its own test inference does not succeed; draining: it is about to stop."""
    software: Annotated[str, msgspec.Meta(max_length=32)] = ""
    families: list[Served] = []
    queue_ms: NonNegative = 0.0
    """How long a request that came now would wait."""
    load: NonNegative = 0.0
    """Share of the last second that the worker spent computing, 0 to 1."""
    served: int = 0
    rejected: int = 0
    """Requests since the start: answered by an exit, and refused (Busy or Failure)."""
    insecure: bool = False
    """It can be reached beyond loopback without TLS."""


Message = (
    Request | Reply | Verify | Verdict | Release | Busy | Failure | Cancel | Probe | Echo | NodeStatus | Fetch | Part
)
