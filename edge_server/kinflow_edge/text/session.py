"""One generation as its server holds it: tokens, attention caches, and what the tier above holds of it."""

from __future__ import annotations

import zlib
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kinflow.errors import SessionLost
from kinflow.text.cache import Cache
from kinflow.text.manifest import LOWER
from kinflow.text.sampling import Choice, Sampling
from kinflow_edge.text.model import Array, Ids, ServedText

if TYPE_CHECKING:
    from kinflow_edge.text.above import Held
    from kinflow_edge.text.job import Job


class Said(NamedTuple):
    """The server's own token after a verdict: the session does not hold its position yet."""

    position: int
    sampling: Sampling
    exit: str
    choice: Choice


class Session:
    """Private data of one client: neither logged nor shown. The worker's thread alone changes it."""

    def __init__(self, client: str, id_: bytes, model: ServedText, now_s: float) -> None:
        self.client = client
        self.id = id_
        self.model = model
        self.used_s = now_s
        self.tokens: Ids = np.zeros(0, np.int64)
        self.caches = model.caches()
        self.shadow: dict[str, Cache] = {}
        """From token ids, through all layers: what `exact` decides by where it is close. Filled when it is needed."""
        self.features: Array = np.zeros((0, model.family.manifest.width), np.float32)
        """At the split that the tier above goes on from."""
        self.said: Said | None = None
        self.above: Held | None = None
        self.job: Job | None = None
        """Under way: the next one waits for it."""
        self.waiting: deque[Job] = deque()
        self.closed = False

    @property
    def length(self) -> int:
        """Positions that it holds."""
        return len(self.tokens)

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches."""
        caches = (*self.caches.values(), *self.shadow.values())
        return sum(cache.bytes for cache in caches) + self.features.nbytes

    def begin(self, job: Job) -> None:
        """Crop to where the job begins. Raises SessionLost when it builds on what is not here."""
        verify = job.verify
        held = min([self.length, *(self.caches[name].length for name in job.way.path)])
        if job.way.split:
            held = min(held, len(self.features))
        if verify.start > held:
            raise SessionLost(f"the session holds {held} positions, the request begins at {verify.start}")
        if verify.start == verify.confirmed and self.recall(job) is None:
            raise SessionLost(f"no verdict of this kind ends at position {verify.start}: begin one position earlier")
        self.crop(verify.start)
        self.tokens = np.concatenate([self.tokens, job.tokens])

    def recall(self, job: Job) -> Choice | None:
        """The last verdict's own token, where the job begins with a draft for its position."""
        if job.verify.start < job.verify.confirmed:
            return None
        key = job.verify.confirmed, job.sampling, job.verify.exit
        return self.said.choice if self.said is not None and self.said[:3] == key else None

    def goes_on_with(self, job: Job) -> bool:
        """For one that follows another: that one's drafts stand, and its own first one is what was said after them."""
        start = job.verify.start
        if start != self.length or zlib.crc32(self.tokens.astype("<u4").tobytes()) != job.verify.follows:
            return False
        choice = self.recall(job)
        return choice is not None and len(job.drafts) > 0 and choice.token == job.drafts[0]

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.tokens = self.tokens[:length]
        self.features = self.features[:length]
        for cache in (*self.caches.values(), *self.shadow.values()):
            cache.crop(length)

    def open_shadow(self) -> int:
        """Its caches, begun with what is known from token ids already; how many positions they hold."""
        if not self.shadow:
            self.shadow = self.model.caches()
            from_ids = self.caches[LOWER].length
            for name, cache in self.shadow.items():
                cache.append(self.caches[name].past[:from_ids])
        held = min(cache.length for cache in self.shadow.values())
        for cache in self.shadow.values():
            cache.crop(held)
        return held
