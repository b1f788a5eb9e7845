"""Token merging: clusters are those of the formula, decoding is exact, and no bytes break it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kinflow import manifest
from kinflow.codec import pack_table, table_from_counts
from kinflow.errors import CodecError
from kinflow.tokens import MAX_TOKENS, TokenMergeCodec, cluster

Shape = tuple[int, int, int]


def spec(channels: int, clusters: int, neighbours: int = 3, bits: Literal[4, 8] = 4) -> tuple[manifest.Codec, bytes]:
    table = pack_table(table_from_counts(np.ones((channels, 256), np.int64)))
    file = manifest.File("t", "0" * 64, len(table))
    merge = manifest.Merge(clusters, neighbours)
    zero = [1 << (bits - 1)] * channels
    return manifest.Codec("token-merge", bits, [0.25] * channels, zero, file, 1.0, merge=merge), table


def make(shape: Shape, clusters: int, neighbours: int = 3, bits: Literal[4, 8] = 4) -> TokenMergeCodec:
    made, table = spec(shape[0], clusters, neighbours, bits)
    return TokenMergeCodec.from_spec("test", shape, made, table)


@st.composite
def codecs(draw: Callable[[Any], Any]) -> TokenMergeCodec:
    """Any small shape, from one cluster to as many as there are tokens."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4)))
    clusters = draw(st.integers(1, shape[1] * shape[2]))
    return make(shape, clusters, draw(st.integers(1, 30)), draw(st.sampled_from([4, 8])))


def slow_cluster(tokens: npt.NDArray[np.float64], clusters: int, neighbours: int) -> list[int]:
    """The formula, word by word; of two equally dense tokens the earlier one counts as denser."""
    count, channels = tokens.shape
    distance = np.array([[np.sqrt(((a - b) ** 2).sum() / channels) for b in tokens] for a in tokens])
    rho = [np.exp(-np.mean(np.sort(np.delete(row, i))[:neighbours] ** 2)) for i, row in enumerate(distance)]
    delta = []
    for i in range(count):
        denser = [distance[i, j] for j in range(count) if (rho[j], -j) > (rho[i], -i)]
        delta.append(min(denser) if denser else distance.max())
    centres = sorted(range(count), key=lambda i: -rho[i] * delta[i])[:clusters]
    return [i if i in centres else min(centres, key=lambda c: distance[i, c]) for i in range(count)]


@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(1, 5))
def test_clusters_are_those_of_the_formula(seed: int, count: int, neighbours: int) -> None:
    """The vectorised clustering agrees with the formula written out, also where mutual neighbours are equally dense."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(0, 1, (count, 3))
    clusters = int(rng.integers(1, count + 1))
    found = cluster(tokens.astype(np.float32), clusters, neighbours)
    assert found.tolist() == slow_cluster(tokens.astype(np.float32).astype(float), clusters, min(neighbours, count - 1))


def test_plain_groups_are_found() -> None:
    """Three heaps of tokens far from each other become three clusters, each one's mean its heap's."""
    rng = np.random.default_rng(0)
    heap = np.repeat([0, 1, 2, 1], [5, 4, 4, 3])
    tokens = np.array([[-1.0, 1.0], [1.5, 0.0], [0.0, -1.25]])[heap] + rng.normal(0, 0.01, (16, 2))
    codec = make((2, 16, 1), 3)
    means, numbers = codec.merge(tokens.T[:, :, None].astype(np.float32))
    assert numbers.tolist() == heap.tolist()
    np.testing.assert_allclose(means[:, :, 0].T, [tokens[heap == i].mean(0) for i in range(3)], atol=1e-6)


@given(codecs(), st.data())
def test_decoded_features_are_the_quantised_means(codec: TokenMergeCodec, data: st.DataObject) -> None:
    """Each token decodes to its cluster's quantised mean, to the last bit, also where tokens are equal or huge."""
    values = st.floats(-1e6, 1e6, width=32)
    features = data.draw(hnp.arrays(np.float32, codec.shape, elements=values))
    means, numbers = codec.merge(features)
    assert sorted(set(numbers.tolist())) == list(range(codec.clusters))
    expected = codec.means.dequantise(codec.means.quantise(means))[:, numbers, 0].reshape(codec.shape)
    decoded = codec.decode(codec.encode(features))
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, expected)


def test_as_many_clusters_as_tokens_lose_nothing_but_levels() -> None:
    """Where every token is its own cluster, only quantising is left."""
    features = np.random.default_rng(0).uniform(-1.5, 1.5, (3, 4, 4)).astype(np.float32)
    decoded = make((3, 4, 4), 16, bits=8).decode(make((3, 4, 4), 16, bits=8).encode(features))
    assert np.abs(decoded - features).max() <= 0.125 + 1e-6


@given(codecs(), st.binary(max_size=80))
def test_any_bytes_decode_or_are_refused(codec: TokenMergeCodec, data: bytes) -> None:
    """Foreign bytes give features of the right shape or a CodecError; what decodes has one form only."""
    try:
        features = codec.decode(data)
    except CodecError:
        return
    assert features.shape == codec.shape
    assert np.isfinite(features).all()


@given(codecs(), st.integers(0, 2**32 - 1), st.data())
def test_damage_is_found_or_harmless(codec: TokenMergeCodec, seed: int, data: st.DataObject) -> None:
    """Bytes cut off or added are always refused; a changed one is refused or gives features of the right shape."""
    coded = codec.encode(np.random.default_rng(seed).normal(0, 1, codec.shape).astype(np.float32))
    for wrong in (coded[: data.draw(st.integers(0, len(coded) - 1))], coded + b"\x01"):
        with pytest.raises(CodecError):
            codec.decode(wrong)
    place = data.draw(st.integers(0, len(coded) - 1))
    changed = bytearray(coded)
    changed[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CodecError):
        assert codec.decode(bytes(changed)).shape == codec.shape


def test_worked_example_of_the_protocol() -> None:
    """Clusters 0, 0, 1, 2, 1 of 3 are the byte 0x16, as docs/protocol.md says."""
    codec = make((1, 5, 1), 3)
    assert codec._pack(np.array([0, 0, 1, 2, 1])) == b"\x16"
    assert codec._unpack(b"\x16") == [0, 0, 1, 2, 1]
    with pytest.raises(CodecError, match="do not decode"):
        codec._unpack(b"\x60")


def test_fewer_clusters_than_promised_are_refused() -> None:
    """A number that leaves a cluster without tokens is no encoder's: all zeros say that one cluster has all."""
    codec = make((2, 8, 1), 4)
    coded = codec.encode(np.random.default_rng(0).normal(0, 1, (2, 8, 1)).astype(np.float32))
    with pytest.raises(CodecError, match="1 clusters of tokens, expected 4"):
        codec.decode(b"\0" * codec._number_bytes + coded[codec._number_bytes :])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_wrong_features_are_refused(value: float) -> None:
    """NaN, infinity and another shape raise CodecError before anything is clustered."""
    codec = make((2, 4, 4), 3)
    features = np.zeros((2, 4, 4), np.float32)
    with pytest.raises(CodecError, match="takes features"):
        codec.encode(features[:1])
    features[1, 2, 3] = value
    with pytest.raises(CodecError, match="NaN or infinity"):
        codec.encode(features)


def test_specs_that_do_not_fit_are_refused() -> None:
    """More clusters or tokens than can be, and a missing `merge`, are errors that say so."""
    made, table = spec(2, 17)
    with pytest.raises(CodecError, match="clusters is 17, the split has 16"):
        TokenMergeCodec.from_spec("test", (2, 4, 4), made, table)
    with pytest.raises(CodecError, match=f"at most {MAX_TOKENS}"):
        TokenMergeCodec.from_spec("test", (2, 33, 32), made, table)
    with pytest.raises(CodecError, match="needs `merge`"):
        TokenMergeCodec.from_spec("test", (2, 4, 4), msgspec.structs.replace(made, merge=None), table)
