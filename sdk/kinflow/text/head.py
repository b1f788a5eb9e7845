"""Runs the LM head with ONNX Runtime: normed features in, logits of all tokens out, or of the likeliest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow.confidence import read
from kinflow.text.segment import Array, Session

# An input of a head that has a shortlist: whether all tokens are wanted.
ALL = "all"


class Likely(NamedTuple):
    """Tokens that may come next."""

    tokens: npt.NDArray[np.int64]
    """[n]"""
    logits: Array
    """[n]"""

    def best(self, temperature: float) -> tuple[int, float]:
        """The likeliest, and the probability that it has among these."""
        label, confidence = read(self.logits, temperature)
        return int(self.tokens[label]), confidence


class HeadRunner:
    """The LM head."""

    def __init__(self, name: str, data: bytes, path: str, threads: int) -> None:
        """Raises BackendError."""
        self.name = name
        self._session = Session(data, path, threads)
        self._short = ALL in self._session.inputs
        if self._short:
            self._session.check({"hidden", ALL}, ["tokens", "logits"])
        else:
            self._session.check({"hidden"}, ["logits"])

    def run(self, hidden: Array) -> Array:
        """Normed features [n, width] -> logits [n, vocabulary]. Raises BackendError."""
        asked = {ALL: np.array(True)} if self._short else {}
        logits: Array = self._session.run({"hidden": hidden, **asked})[-1]
        return logits

    def likely(self, hidden: Array) -> Likely | None:
        """Normed features [1, width] -> its likeliest tokens, nearly always; None where the graph has no shortlist.

        Much faster than `run`. Raises BackendError.
        """
        if not self._short:
            return None
        tokens, logits = self._session.run({"hidden": hidden, ALL: np.array(False)})
        return Likely(tokens[0], logits[0])
