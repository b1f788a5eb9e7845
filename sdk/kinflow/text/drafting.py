"""The device's side of one text: positions computed and coded, and drafts that no server has decided yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from kinflow.confidence import read
from kinflow.text.codec import FeatureCodec
from kinflow.text.draft import Pace
from kinflow.text.drafter import Array, Drafter
from kinflow.text.remote import Positions
from kinflow.text.sampling import Sampling, choose
from kinflow.text.segment import Interrupt, Interrupted


class Draft(NamedTuple):
    """A token of the device's exit."""

    token: int
    probability: float


class Drafting:
    """What is drafted, token by token. Its methods raise BackendError when a graph fails."""

    def __init__(
        self,
        drafter: Drafter,
        codec: FeatureCodec | None,
        positions: Positions,
        sampling: Sampling,
        temperature: float,
        pace: Pace,
    ) -> None:
        """`codec`: of the features; None where only ids travel. `temperature`: of the exit's confidence."""
        self.drafts: list[Draft] = []
        """Of the positions behind those that are confirmed."""
        self._drafter = drafter
        self._codec = codec
        self._positions = positions
        self._sampling = sampling
        self._temperature = temperature
        self._pace = pace
        self._next: Draft | None = None
        """What `choose` found for the position after the last one computed."""
        self._interrupt = Interrupt()

    @property
    def length(self) -> int:
        """Positions computed."""
        return self._drafter.length

    def begin(self, prompt: Sequence[int]) -> None:
        """Compute the prompt's positions."""
        self._computed(prompt, self._drafter.begin(prompt))

    def add(self, token: int, interrupt: Interrupt | None = None) -> None:
        """Compute one more. Raises Interrupted."""
        start_s = time.perf_counter()
        features = self._drafter.feed(token, interrupt)
        self._pace.computed(time.perf_counter() - start_s)
        self._computed([token], features)

    def draft(self) -> None:
        """One more draft, unless `interrupt` ends it."""
        draft = self.choose()
        # Already now: whoever interrupts looks whether it is what a verdict says.
        self.drafts.append(draft)
        try:
            self.add(draft.token, self._interrupt)
        except Interrupted:
            self.drafts.pop()

    def heed(self) -> None:
        """From here on `interrupt` ends the next draft."""
        self._interrupt = Interrupt()

    def interrupt(self) -> None:
        """For another thread: what is being drafted has become needless."""
        self._interrupt.set()

    def choose(self) -> Draft:
        """A draft of what comes next, and how likely it is to stand."""
        if self._next is None:
            start_s = time.perf_counter()
            likely = self._drafter.likely() if self._sampling.temperature == 0 else None
            self._next = self.own() if likely is None else Draft(*likely.best(self._temperature))
            self._pace.read(time.perf_counter() - start_s)
        return self._next

    def own(self) -> Draft:
        """What the device's exit says next, and how sure it is of that."""
        logits = self._drafter.logits
        if self._sampling.temperature == 0:
            return Draft(*read(logits, self._temperature))
        return Draft(*choose(logits, self._sampling, self._drafter.length)[:2])

    def confidence(self) -> float:
        """Of the exit in its likeliest token, whatever is sampled."""
        return read(self._drafter.logits, self._temperature).confidence

    def fell(self, length: int) -> None:
        """All drafts are void; positions from `length` on too."""
        self.drafts = []
        self._drafter.crop(length)
        self._positions.crop(length)

    def _computed(self, tokens: Sequence[int], features: Array) -> None:
        self._next = None
        self._positions.add(tokens, self._codec.encode(features) if self._codec else b"")
