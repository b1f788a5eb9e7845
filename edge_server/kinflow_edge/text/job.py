"""One admitted verification, and what is computed for it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kinflow.messages import Hop, Tier, Verify
from kinflow.text.cache import Cache
from kinflow.text.sampling import Sampling
from kinflow_edge.text.model import Array, Ids, ServedText, Way
from kinflow_edge.text.session import Session

Stage = Literal["verify", "redo", "own"]
"""Why positions are fed: as asked; from token ids, where it was close; to decide without the tier above."""


class Feed:
    """Positions on their way through some segments, in chunks. Their caches grow with it."""

    def __init__(self, path: Sequence[str], caches: Mapping[str, Cache], inputs: npt.NDArray[np.generic]) -> None:
        """`inputs`: token ids [n] or features [n, width]."""
        self.path = tuple(path)
        self.caches = caches
        self._inputs = inputs
        self._done = 0
        self._outputs: list[Array] = []
        self.passes = 0

    @property
    def left(self) -> int:
        """Positions still to be fed."""
        return len(self._inputs) - self._done

    @property
    def count(self) -> int:
        return len(self._inputs)

    def next(self, most: int) -> npt.NDArray[np.generic]:
        """The next positions, at most so many."""
        return self._inputs[self._done : self._done + most]

    def advance(self, outputs: Array) -> None:
        """The next positions have gone through: what came out, [positions, width]."""
        self._outputs.append(outputs)
        self._done += len(outputs)
        self.passes += 1

    @property
    def outputs(self) -> Array:
        """[n, width]"""
        return np.concatenate(self._outputs)


@dataclass(eq=False)
class Job:
    """One admitted verification. What is known at once comes first, what it becomes below."""

    verify: Verify
    model: ServedText
    way: Way
    tokens: Ids
    features: Array | None
    """[count, width]; None: from token ids."""
    arrived_s: float
    admitted_s: float
    due_s: float
    test: bool
    """The server's own: decided here."""

    left: int
    """Positions that wait to be computed."""

    session: Session | None = None
    stage: Stage = "verify"
    feed: Feed | None = None
    begun_s: float = 0.0
    compute_s: float = 0.0
    layer_tokens: int = 0
    passes: int = 0
    redone: int = 0
    bytes_up: int = 0
    why: str = ""
    """Why another exit decides than the one that was asked for."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.verify.temperature, self.verify.top_p, self.verify.seed)

    @property
    def drafts(self) -> Ids:
        return self.tokens[self.verify.confirmed - self.verify.start :]

    @property
    def end(self) -> int:
        """The first position that was not sent."""
        return self.verify.start + self.verify.count

    @property
    def feeding(self) -> Feed:
        assert self.feed is not None
        return self.feed

    def fed(self) -> Feed:
        """The feed is through: count it, and hand it out."""
        feed, self.feed = self.feeding, None
        self.layer_tokens += self.model.layers(feed.path) * feed.count
        self.passes += feed.passes
        return feed

    def hop(self, node: str, tier: Tier) -> Hop:
        decode_ms = (self.admitted_s - self.arrived_s) * 1e3
        queue_ms = (self.begun_s - self.admitted_s) * 1e3
        total_ms = (time.monotonic() - self.arrived_s) * 1e3
        return Hop(node, tier, decode_ms, queue_ms, self.compute_s * 1e3, total_ms, self.bytes_up)
