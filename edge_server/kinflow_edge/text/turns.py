"""Who is computed next: short verifications together, long ones in chunks between them. Pure."""

from __future__ import annotations

from collections.abc import Callable

from kinflow_edge.fair import FairQueue
from kinflow_edge.text.job import Job

# A batch is padded to its longest: what has more positions than this is a chunk of its own.
SHORT = 16
SMOOTHING = 0.2
UNBOUNDED = 1 << 30


class Turns:
    """Clients are served in turn. After each batch of short jobs comes one chunk of a long one, if there are any."""

    def __init__(self, size: int, chunk: int) -> None:
        """`size`: jobs of a batch; `chunk`: positions of one session in a pass."""
        self._size = size
        self._chunk = chunk
        self._short: FairQueue[Job] = FairQueue(UNBOUNDED, UNBOUNDED)
        self._long: FairQueue[Job] = FairQueue(UNBOUNDED, UNBOUNDED)
        self._long_is_next = False
        self._short_s = 0.0
        self._chunk_s = 0.0

    def __len__(self) -> int:
        return len(self._short) + len(self._long)

    def put(self, job: Job) -> None:
        """It needs a pass; one that is not through after it is put in again."""
        (self._short if job.left <= SHORT else self._long).put(job.verify.client, job)

    def next(self) -> list[Job]:
        """The next pass, taken out; all of one model. Empty when nobody waits."""
        if len(self._long) and (self._long_is_next or not len(self._short)):
            self._long_is_next = False
            return [self._long.take()]
        self._long_is_next = True
        taken = [self._short.take() for _ in range(min(self._size, len(self._short)))]
        batch = [job for job in taken if job.model is taken[0].model]
        for job in taken:
            if job.model is not taken[0].model:
                self.put(job)
        return batch

    def remove(self, client: str, matches: Callable[[Job], bool]) -> bool:
        """Take the client's job that matches out; whether it was there."""
        return self._short.remove(client, matches) or self._long.remove(client, matches)

    def took(self, positions: int, spent_s: float) -> None:
        """What the pass with so many positions of its longest job cost."""
        if positions <= SHORT:
            self._short_s = _towards(self._short_s, spent_s)
        else:
            self._chunk_s = _towards(self._chunk_s, spent_s)

    def wait_s(self, positions: int) -> float:
        """How long a job that is put in now would take until it is through."""
        short, long = len(self._short), len(self._long)
        if positions <= SHORT:
            return (1 + short // self._size) * self._short_s + (self._chunk_s if long else 0.0)
        passes = -(-positions // self._chunk)
        return passes * ((1 + long) * self._chunk_s + (self._short_s if short else 0.0))


def _towards(average: float, sample: float) -> float:
    return sample if average == 0.0 else average + SMOOTHING * (sample - average)
