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
# Below it every sample is the likeliest token, and logits / T would overflow.
COLDEST = 1e-6


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen. The default takes the likeliest."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    """0: the likeliest token."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that have this share together (nucleus sampling, arXiv 1904.09751)."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


GREEDY = Sampling()
# How many of the likeliest tokens are sorted first to find a nucleus.
SORTED = (256, 4096)


class Choice(NamedTuple):
    """One chosen token."""

    token: int
    probability: float
    """Of this token in the distribution it was chosen from; for the likeliest one, in softmax(logits)."""
    margin: float
    """By how much the sum it was chosen by, in units of logits, is above the next one's."""


def choose(logits: Array, sampling: Sampling, position: int) -> Choice:
    """The token at `position`, from its logits [vocabulary]. Of equal ones the lowest id."""
    if sampling.temperature < COLDEST:
        token, margin = _largest(logits)
        return Choice(token, _probability(logits, token), margin)
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    if sampling.top_p < 1:
        scaled = _nucleus(scaled, sampling.top_p)
    token, margin = _largest(scaled + noise(sampling.seed, position, len(scaled)))
    return Choice(token, _probability(scaled, token), margin * sampling.temperature)


def certain(logits: Array, sampling: Sampling, position: int, bound: float) -> bool:
    """Whether the token at `position` would be the same if each logit were off by up to `bound`.

    The sum that was taken must be above each other one by what both may be off. With `top_p` it must also be in the
    nucleus surely, and above all that may be in it: a share changes by a factor of exp(2 * bound / temperature) at the
    most, and tokens whose logits are closer than twice the bound may change places.
    """
    if sampling.temperature == 0 or sampling.top_p >= 1:
        return choose(logits, sampling, position).margin >= 2 * bound
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    off = 2 * bound / sampling.temperature
    for wanted in (0.5 + 0.5 * sampling.top_p, 1.0):
        order, share = _likeliest(scaled, wanted)
        falling = -scaled[order]
        before = np.concatenate([[0.0], share])
        # The share of those that are before each one surely, and with those that are perhaps.
        surely = before[np.searchsorted(falling, falling - off, side="left")]
        perhaps = before[np.searchsorted(falling, falling + off, side="right")]
        outside = surely * np.exp(-off) >= sampling.top_p
        possible = order[~outside]
        best, margin = _largest(scaled[possible] + noise(sampling.seed, position, len(scaled))[possible])
        if outside[-1] and falling[best] + off < falling[-1]:
            break  # none of the others matters
    own = share[best] - before[best]
    return bool(margin >= off and (perhaps[best] - own) * np.exp(off) < sampling.top_p)


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
    order, share = _likeliest(scaled, top_p)
    kept = order[: int(np.searchsorted(share, top_p)) + 1]
    nucleus = np.full_like(scaled, -np.inf)
    nucleus[kept] = scaled[kept]
    return nucleus


def _likeliest(scaled: npt.NDArray[np.float64], wanted: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The largest, of equal ones the lowest id first, and the share that each has with all before it.

    As many as have the share `wanted`, and more: sorting all of them takes longer than a small model's layers.
    """
    terms = np.exp(scaled - scaled.max())
    total = terms.sum()
    for most in (*SORTED, len(scaled)):
        among = np.arange(len(scaled))
        if most < len(scaled):
            among = np.flatnonzero(scaled >= np.partition(scaled, -most)[-most])
        order = among[np.argsort(-scaled[among], kind="stable")]
        share = np.cumsum(terms[order]) / total
        if share[-1] >= wanted:
            break
    return order, share
