"""The device's own model: its layers, branch and head, one text at a time.

After the prompt it takes tokens one by one, also where several are known: then a position's features do not depend
on what was drafted and rejected before it, and a text can be repeated bit by bit. What the exit would say is computed
when it is asked for: features are ready to be sent before that, and what a verdict makes needless is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kinflow.errors import FamilyMismatch
from kinflow.text.family import TextFamily
from kinflow.text.head import HeadRunner, Likely
from kinflow.text.manifest import LOWER, Precision
from kinflow.text.segment import Interrupt, TextSegment

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DeviceModel:
    """The device member's opened graphs; any number of texts share them."""

    family: TextFamily
    exit: str
    split: str
    lower: TextSegment
    branch: TextSegment
    head: HeadRunner

    @classmethod
    def open(cls, family: TextFamily, precision: Precision, threads: int) -> DeviceModel:
        """Raises FamilyMismatch, BundleError, BackendError."""
        exit_name, spec = next(iter(family.manifest.exits.items()))
        if len(spec.segments) != 2 or spec.segments[0] != LOWER:
            raise FamilyMismatch(f"{family.id}: exit {exit_name!r} must be {LOWER!r} and a branch: {spec.segments}")
        branch = spec.segments[1]
        return cls(
            family,
            exit_name,
            family.manifest.segments[LOWER].result,
            family.segment(LOWER, precision, threads=threads),
            family.segment(branch, precision, threads=threads),
            family.head(precision, threads=threads),
        )


class Drafter:
    """One text: which positions the device has computed, and what it would say next."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._lower = model.lower.past()
        self._branch = model.branch.past()
        self._features: list[Array] = []
        """[1, tokens, width]: the prompt's, then those of one position each."""
        self._prompt = 0
        self._normed: Array | None = None
        """[1, width]: what the branch made of the last position, for the head."""
        self._logits: Array | None = None

    @property
    def length(self) -> int:
        """Positions computed."""
        return self._lower.length

    def begin(self, prompt: Sequence[int]) -> Array:
        """All of the prompt at once; its features [tokens, width]. Raises BackendError."""
        self._prompt = len(prompt)
        return self._run(np.array([prompt], np.int64))

    def feed(self, token: int, interrupt: Interrupt | None = None) -> Array:
        """One more token; its features [1, width]. Raises BackendError, Interrupted."""
        return self._run(np.array([[token]], np.int64), interrupt)

    @property
    def logits(self) -> Array:
        """[vocabulary], for the position after the last one. Raises BackendError."""
        if self._logits is None:
            self._logits = self._model.head.run(self._exit())[0]
        return self._logits

    def likely(self) -> Likely | None:
        """As HeadRunner.likely, for the position after the last one."""
        return self._model.head.likely(self._exit())

    def _exit(self) -> Array:
        if self._normed is None:
            # Where the branch has read the last position before, it reads it again.
            self._branch.crop(self.length - 1 if self.length > self._prompt else 0)
            read = self._branch.length
            unread = self._features[read - self._prompt + 1 if read else 0 :]
            self._normed = self._model.branch.run(np.concatenate(unread, 1), [self._branch])[0, -1:]
        return self._normed

    def crop(self, length: int) -> None:
        """Forget positions from `length` on; the prompt stays."""
        assert length >= self._prompt
        if length < self.length:
            self._lower.crop(length)
            self._branch.crop(length)
            del self._features[length - self._prompt + 1 :]
            self._normed = self._logits = None

    def _run(self, ids: npt.NDArray[np.int64], interrupt: Interrupt | None = None) -> Array:
        features = self._model.lower.run(ids, [self._lower], interrupt=interrupt)
        self._features.append(features)
        self._normed = self._logits = None
        mine: Array = features[0]
        return mine
