"""What generated texts are compared with: plain decoding, one token at a time, no drafts and no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kinflow.text.codec import FeatureCodec
from kinflow.text.family import TextFamily
from kinflow.text.manifest import LOWER, Precision
from kinflow.text.sampling import Sampling, choose

Array = npt.NDArray[np.float32]


class Text(NamedTuple):
    """A reference text."""

    tokens: list[int]
    """With its stop token, where it ended by one."""
    margins: list[float]
    """By how much each token's logit is above the next best one's."""
    seconds: float
    """Of the tokens after the first: the prompt's time is everybody's."""


class Reference:
    """The largest member, with the device's layers at `precision` and its features coded by `codec`."""

    def __init__(
        self, family: TextFamily, precision: Precision = "float", codec: FeatureCodec | None = None, threads: int = 1
    ) -> None:
        path = family.manifest.exits[family.manifest.last_exit()].segments
        self._family = family
        self._codec = codec
        self._segments = [
            family.segment(name, precision if name == LOWER else "float", threads=threads) for name in path
        ]
        self._head = family.head("float", threads=threads)

    def decode(self, prompt: Sequence[int], most: int, sampling: Sampling) -> Text:
        """At most `most` tokens after `prompt`."""
        caches = [segment.past() for segment in self._segments]
        logits = self._logits(prompt, caches)
        tokens: list[int] = []
        margins: list[float] = []
        start_s = time.perf_counter()
        while True:
            choice = choose(logits, sampling, len(prompt) + len(tokens))
            tokens.append(choice.token)
            margins.append(choice.margin)
            if len(tokens) == most or choice.token in self._family.manifest.stop_tokens:
                return Text(tokens, margins, time.perf_counter() - start_s)
            logits = self._logits([choice.token], caches)

    def logits(self, text: Sequence[int], prompt: int = 0) -> Array:
        """[vocabulary], for the position after `text`, whose first `prompt` tokens are taken at once."""
        caches = [segment.past() for segment in self._segments]
        logits = self._logits(text[: prompt or len(text)], caches)
        for token in text[prompt:] if prompt else ():
            logits = self._logits([token], caches)
        return logits

    def choices(self, prompt: Sequence[int], text: Sequence[int]) -> list[int]:
        """Its own greedy token at each position of `text`, after `prompt` and what `text` has before it."""
        hidden: npt.NDArray[Any] = np.array([[*prompt, *text]], np.int64)
        for segment in self._segments:
            hidden = self._coded(segment.name, segment.run(hidden, [segment.past()]))
        return list(map(int, self._head.run(hidden[0, len(prompt) - 1 : -1]).argmax(-1)))

    def _logits(self, tokens: Sequence[int], caches: Sequence[Any]) -> Array:
        """For the position after the last of `tokens`."""
        hidden: npt.NDArray[Any] = np.array([tokens], np.int64)
        for segment, cache in zip(self._segments, caches, strict=True):
            hidden = self._coded(segment.name, segment.run(hidden, [cache]))
        last: Array = self._head.run(hidden[0, -1:])[0]
        return last

    def _coded(self, segment: str, hidden: Array) -> Array:
        """What `segment` made of one text, as it is for the next one."""
        if segment != LOWER or self._codec is None:
            return hidden
        return self._codec.decode(self._codec.encode(hidden[0]), hidden.shape[1])[None]
