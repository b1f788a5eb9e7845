"""Which token follows. Pure: the same logits, seed and position give the same token on every machine.

Sampling adds noise to the logits and takes the largest sum (Gumbel-max): that is a sample of softmax(logits / T).
The noise depends on the seed and the position alone, so whoever drafts and whoever verifies use the same one, and
agree often where their logits are alike. The text is always the verifier's own sample, so drafts cannot change its
distribution: "drafter-invariant speculative decoding", Daliri, Musco and Suresh, arXiv 2408.07978.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.confidence import MOST

Array = npt.NDArray[np.float32]


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen. The default takes the likeliest."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    """0: the likeliest token."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that have this share together (nucleus sampling, arXiv 1904.09751)."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


GREEDY = Sampling()


class Choice(NamedTuple):
    """One chosen token."""

    token: int
    probability: float
    """Of this token in the distribution it was chosen from; for the likeliest one, in softmax(logits)."""
    margin: float
    """By how much the sum it was chosen by, in units of logits, is above the next one's."""


def choose(logits: Array, sampling: Sampling, position: int) -> Choice:
    """The token at `position`, from its logits [vocabulary]. Of equal ones the lowest id."""
    if sampling.temperature == 0:
        token, margin = _largest(logits)
        return Choice(token, _probability(logits, token), margin)
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    if sampling.top_p < 1:
        scaled = _nucleus(scaled, sampling.top_p)
    token, margin = _largest(scaled + noise(sampling.seed, position, len(scaled)))
    return Choice(token, _probability(scaled, token), margin * sampling.temperature)


def noise(seed: int, position: int, vocabulary: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise: -log(-log(u)) with u from a counter-based generator (Philox, Salmon et al., 2011)."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, position]).random_raw(vocabulary)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
    return np.asarray(-np.log(-np.log(uniform)))


def _largest(values: npt.NDArray[np.floating]) -> tuple[int, float]:
    """Where the largest is, and how far above the second."""
    token = int(values.argmax())
    second = max(values[:token].max(initial=-np.inf), values[token + 1 :].max(initial=-np.inf))
    return token, float(values[token] - second)


def _probability(values: npt.NDArray[np.floating], token: int) -> float:
    terms = np.exp(np.asarray(values, np.float64) - float(values.max()))
    return min(float(terms[token] / terms.sum()), MOST)


def _nucleus(scaled: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.float64]:
    """All but the nucleus at -inf."""
    order = np.argsort(-scaled, kind="stable")
    terms = np.exp(scaled[order] - scaled[order[0]])
    share = np.cumsum(terms) / terms.sum()
    kept = order[: int(np.searchsorted(share, top_p)) + 1]
    nucleus = np.full_like(scaled, -np.inf)
    nucleus[kept] = scaled[kept]
    return nucleus
