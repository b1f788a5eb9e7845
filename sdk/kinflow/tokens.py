"""Codec kind `token-merge`: like tokens are merged, then each cluster's mean is coded as `uniform-rans` does it.

A token is one place of the features [channels, height, width]. Density peaks choose the tokens that stand for
others (DPC-KNN: Du, Ding and Jia 2016; for features on a link: TOFC, arXiv 2503.12926): with distances in units
of √channels, a token's density is rho = exp(−mean squared distance to its nearest neighbours), delta its
distance to the nearest denser token, and the centres are the largest rho × delta. Every other token joins its
nearest centre.

A payload is two parts. First the tokens' clusters, numbered in order of appearance: a token has the number of
one of the m clusters seen before it, or m, so its number is a digit to the base min(m + 1, clusters). The digits,
last one first, make one integer. Then the means, coded as features [channels, clusters, 1]. Decoding is integer
arithmetic until the last product, as in codec.py, so all machines decode the same features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.codec import Features, UniformCodec
from kinflow.errors import CodecError
from kinflow.manifest import Codec as CodecSpec

# Distances are taken between all pairs.
MAX_TOKENS = 1024

FeatureCodec: TypeAlias = "UniformCodec | TokenMergeCodec"
"""What a family's codecs are."""

Clusters = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenMergeCodec:
    """Codes features of `shape` [channels, height, width] as the means of exactly `clusters` clusters of tokens.

    Made by `TokenMergeCodec.from_spec`, which checks that the numbers fit together.
    """

    name: str
    shape: tuple[int, int, int]
    clusters: int
    neighbours: int
    means: UniformCodec
    """Of shape [channels, clusters, 1]."""

    @classmethod
    def from_spec(cls, name: str, shape: tuple[int, int, int], spec: CodecSpec, table: bytes | None) -> TokenMergeCodec:
        """Raises CodecError when the table and the numbers do not fit the split's shape."""
        tokens = math.prod(shape[1:])
        if spec.merge is None:
            raise CodecError(f"codec {name!r}: kind token-merge needs `merge`")
        if tokens > MAX_TOKENS:
            raise CodecError(f"codec {name!r}: the split has {tokens} tokens, at most {MAX_TOKENS} can be merged")
        if spec.merge.clusters > tokens:
            raise CodecError(f"codec {name!r}: merge.clusters is {spec.merge.clusters}, the split has {tokens} tokens")
        plain = msgspec.structs.replace(spec, kind="uniform-rans", merge=None)
        means = UniformCodec.from_spec(name, (shape[0], spec.merge.clusters, 1), plain, table)
        return cls(name, shape, spec.merge.clusters, spec.merge.neighbours, means)

    def encode(self, features: Features) -> bytes:
        """Coded bytes of one item. Raises CodecError on another shape or values that are not finite."""
        if features.shape != self.shape:
            raise CodecError(f"codec {self.name!r} takes features of {self.shape}, got {features.shape}")
        if not np.isfinite(features).all():
            raise CodecError(f"codec {self.name!r}: the features hold NaN or infinity")
        means, numbers = self.merge(features)
        return self._pack(numbers) + self.means.encode(means)

    def decode(self, data: bytes | memoryview) -> Features:
        """Features of one item, float32: each token gets its cluster's mean.

        Raises CodecError when `data` is not what `encode` made.
        """
        numbers = self._unpack(data[: self._number_bytes])
        means = self.means.decode(data[self._number_bytes :])
        return np.ascontiguousarray(means[:, numbers, 0].reshape(self.shape))

    def merge(self, features: Features) -> tuple[Features, Clusters]:
        """Means float32 [channels, clusters, 1], and each token's cluster [tokens], in order of appearance."""
        tokens = features.reshape(self.shape[0], -1).T
        chosen = cluster(tokens, self.clusters, self.neighbours)
        _, first, numbers = np.unique(chosen, return_index=True, return_inverse=True)
        numbers = np.argsort(np.argsort(first))[numbers.reshape(-1)]
        member = np.zeros((self.clusters, len(tokens)), np.float32)
        member[numbers, np.arange(len(tokens))] = 1
        means = (member / member.sum(axis=1, keepdims=True)) @ tokens.astype(np.float32)
        return np.ascontiguousarray(means.T[:, :, None]), np.asarray(numbers, np.int64)

    @cached_property
    def _number_bytes(self) -> int:
        most = math.prod(min(position + 1, self.clusters) for position in range(math.prod(self.shape[1:])))
        return ((most - 1).bit_length() + 7) // 8

    def _pack(self, numbers: Clusters) -> bytes:
        digits = []
        seen = 0
        for number in numbers.tolist():
            digits.append((number, min(seen + 1, self.clusters)))
            seen = max(seen, number + 1)
        value = 0
        for number, base in reversed(digits):
            value = value * base + number
        return value.to_bytes(self._number_bytes, "little")

    def _unpack(self, data: bytes | memoryview) -> list[int]:
        if len(data) != self._number_bytes:
            raise CodecError(f"coded features end among the tokens' clusters: {len(data)} bytes")
        value = int.from_bytes(data, "little")
        numbers: list[int] = []
        seen = 0
        for _ in range(math.prod(self.shape[1:])):
            value, number = divmod(value, min(seen + 1, self.clusters))
            numbers.append(number)
            seen = max(seen, number + 1)
        if value or seen != self.clusters:
            raise CodecError(f"coded features do not decode: {seen} clusters of tokens, expected {self.clusters}")
        return numbers


def cluster(tokens: Features, clusters: int, neighbours: int) -> Clusters:
    """For each of `tokens` [tokens, channels] the token that stands for its cluster; a centre stands for itself.

    The logarithm of rho × delta is compared: it orders the same and never underflows. Where two tokens are equally
    dense, the earlier one counts as denser.
    """
    squares = np.zeros((len(tokens), len(tokens)))
    # Channel by channel: all differences at once would take channels times the memory, and norms less products
    # would not give both directions of a pair the same distance, which is what makes ties ties.
    for channel in tokens.T.astype(np.float64):
        squares += np.square(channel[:, None] - channel)
    squares /= tokens.shape[1]
    nearest = np.sort(squares, axis=1)[:, 1 : 1 + max(1, min(neighbours, len(tokens) - 1))]
    density = -nearest.mean(axis=1) if nearest.size else np.zeros(len(tokens))
    rank = np.empty(len(tokens), np.int64)
    rank[np.argsort(-density, kind="stable")] = np.arange(len(tokens))
    denser = np.where(rank[None] < rank[:, None], squares, np.inf).min(axis=1)
    denser[rank == 0] = squares.max()
    with np.errstate(divide="ignore"):
        score = density + 0.5 * np.log(denser)
    centres = np.argsort(-score, kind="stable")[:clusters]
    chosen = centres[squares[:, centres].argmin(axis=1)]
    chosen[centres] = centres
    return np.asarray(chosen, np.int64)
