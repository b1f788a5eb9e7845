"""The pure parts of text generation: codec, cache, sampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinflow.errors import CodecError
from kinflow.text.cache import MASKED, Cache, stack
from kinflow.text.codec import F16Codec, Int8Codec, open_codec
from kinflow.text.manifest import TokenCodec
from kinflow.text.sampling import GREEDY, Sampling, _nucleus, certain, choose, noise

WIDTH = 24


def features(tokens: int, seed: int = 0) -> np.ndarray:
    """As a decoder's are: few channels far larger than the others, tokens of very different sizes."""
    random = np.random.default_rng(seed)
    channels = np.where(np.arange(WIDTH) == 3, 300.0, 1.0)
    sizes = np.exp(random.normal(size=(tokens, 1)))
    return (random.normal(size=(tokens, WIDTH)) * channels * sizes).astype(np.float32)


def int8() -> Int8Codec:
    return Int8Codec(np.where(np.arange(WIDTH) == 3, 300.0, 1.0).astype(np.float32))


def test_int8_error_is_half_a_step() -> None:
    """Each value comes back within half a step of its own token and channel, in 2 + width bytes."""
    codec, sent = int8(), features(50)
    data = codec.encode(sent)
    assert len(data) == 50 * (2 + WIDTH) == 50 * codec.token_bytes
    relative = np.abs(codec.decode(data, 50) - sent) / np.where(np.arange(WIDTH) == 3, 300.0, 1.0)
    step = np.abs(sent / np.where(np.arange(WIDTH) == 3, 300.0, 1.0)).max(axis=1) / 127
    assert (relative <= 0.5005 * 1.002 * step[:, None]).all()


def test_int8_is_coded_token_by_token() -> None:
    """A token's bytes do not depend on the tokens beside it."""
    codec, sent = int8(), features(5)
    assert codec.encode(sent) == b"".join(codec.encode(sent[i : i + 1]) for i in range(5))


def test_zeros_and_huge_values_survive() -> None:
    """A token of zeros comes back as zeros; one beyond float16's scale is clipped, not infinite."""
    codec = int8()
    sent = np.zeros((2, WIDTH), np.float32)
    sent[1] = 1e9
    back = codec.decode(codec.encode(sent), 2)
    assert not back[0].any()
    assert np.isfinite(back).all()


def test_f16() -> None:
    """float16 comes back within its precision; what does not fit is refused."""
    codec, sent = F16Codec(WIDTH), features(9)
    np.testing.assert_allclose(codec.decode(codec.encode(sent), 9), sent, rtol=1e-3)
    with pytest.raises(CodecError, match="float16"):
        codec.encode(np.full((1, WIDTH), 1e6, np.float32))


@pytest.mark.parametrize("codec", [int8(), F16Codec(WIDTH)], ids=["int8", "f16"])
def test_bad_features_and_bytes_are_refused(codec: Int8Codec | F16Codec) -> None:
    """NaN is not coded; a wrong length and a scale or value that is not finite are not decoded."""
    sent = features(2)
    sent[1, 5] = np.nan
    with pytest.raises(CodecError, match="finite"):
        codec.encode(sent)
    data = codec.encode(features(2))
    with pytest.raises(CodecError, match="tokens of"):
        codec.decode(data[:-1], 2)
    with pytest.raises(CodecError, match="finite"):
        codec.decode(np.float16(np.nan).tobytes() + data[2:], 2)


def test_scale_must_fit() -> None:
    """A manifest's scale of another width is refused by name."""
    with pytest.raises(CodecError, match="codec 'int8': scale has 3 values"):
        open_codec("int8", TokenCodec("token-int8", (1.0, 1.0, 1.0)), WIDTH)


@pytest.mark.parametrize("scale", [1e-300, 1e38, 1e300])
def test_scale_must_be_a_usable_float32(scale: float) -> None:
    """One that becomes 0, or makes values infinite, would decode to no features."""
    with pytest.raises(CodecError, match="codec 'int8': each scale must be positive"):
        open_codec("int8", TokenCodec(kind="token-int8", scale=(scale, 1.0)), 2)


def entries(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, 2, 2, 3, 4)).astype(np.float32)


def test_cache_appends_and_crops() -> None:
    """What was cropped is overwritten by what comes next; growing keeps the rest."""
    cache = Cache(2, 3, 4)
    first, second = entries(50, 0), entries(100, 1)
    cache.append(first)
    cache.crop(20)
    cache.crop(30)
    cache.append(second)
    assert cache.length == 120
    np.testing.assert_array_equal(cache.past, np.concatenate([first[:20], second]))


def test_stack_masks_padding_and_future() -> None:
    """A token sees its own session's past and the tokens up to itself, nothing else."""
    short, long = Cache(2, 3, 4), Cache(2, 3, 4)
    short.append(entries(2, 0))
    long.append(entries(4, 1))
    batch = stack([short, long], 3)
    assert batch.past.shape == (2, 4, 2, 2, 3, 4)
    np.testing.assert_array_equal(batch.past[0, :2], short.past)
    np.testing.assert_array_equal(batch.positions, [[2, 3, 4], [4, 5, 6]])
    seen = batch.bias[:, 0] == 0
    assert (seen | (batch.bias[:, 0] == MASKED)).all()
    np.testing.assert_array_equal(
        seen[0].astype(int), [[1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1]]
    )
    assert seen[1, :, :4].all()


def test_greedy_takes_the_lowest_of_equal_ones() -> None:
    """Without temperature: the first of the largest, its softmax probability, the distance to the next."""
    assert choose(np.array([1, 3, 3, 2], np.float32), GREEDY, 7).token == 1
    choice = choose(np.array([0, 2, 1], np.float32), GREEDY, 0)
    assert choice.token == 1
    assert choice.margin == 1
    assert choice.probability == pytest.approx(np.exp(2) / (np.exp(2) + np.exp(1) + 1))


def test_noise_is_fixed() -> None:
    """The noise of a seed and position is part of the protocol: these values may never change."""
    np.testing.assert_allclose(noise(7, 3, 4), FIXED_NOISE, rtol=1e-12)
    assert not np.array_equal(noise(7, 4, 4), noise(7, 3, 4))
    assert not np.array_equal(noise(8, 3, 4), noise(7, 3, 4))


FIXED_NOISE = [-0.2689630901262625, 2.022011024204191, -1.0308739274177852, -0.08262765827672428]


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0), Sampling(0.5, 1.0), Sampling(1.0, 0.7)])
def test_samples_follow_the_distribution(sampling: Sampling) -> None:
    """Over many positions tokens come as often as softmax(logits / T), cut to the nucleus, says (chi-square)."""
    from scipy.stats import chisquare

    logits = np.array([2.0, 1.5, 1.0, 0.0, -1.0], np.float32)
    terms = np.exp(logits.astype(float) / sampling.temperature)
    expected = terms / terms.sum()
    if sampling.top_p < 1:
        expected = np.where(np.cumsum(expected) - expected < sampling.top_p, expected, 0)
        expected /= expected.sum()
    counts = np.zeros(5)
    for position in range(4000):
        choice = choose(logits, sampling, position)
        counts[choice.token] += 1
        assert choice.probability == pytest.approx(expected[choice.token])
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], 4000 * expected[possible]).pvalue > 0.01


@given(st.integers(0, 2**63 - 1), st.integers(0, 40_000))
def test_drafter_and_verifier_agree_on_equal_logits(seed: int, position: int) -> None:
    """Nearly equal logits give the same sample unless the margin is as small as their difference."""
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 3
    other = logits + np.random.default_rng(1).uniform(-1e-3, 1e-3, 50).astype(np.float32)
    sampling = Sampling(0.8, 1.0, seed)
    mine, theirs = choose(logits, sampling, position), choose(other, sampling, position)
    assert mine.token == theirs.token or mine.margin < 3e-3


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_the_nucleus_is_what_sorting_all_gives(spread: float, top_p: float) -> None:
    """However many tokens it takes, and with equal ones at its edge."""
    scaled = np.round(np.random.default_rng(4).normal(size=6000), 2) * spread
    order = np.argsort(-scaled, kind="stable")
    terms = np.exp(scaled - scaled.max())
    kept = order[: int(np.searchsorted(np.cumsum(terms[order]) / terms.sum(), top_p)) + 1]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(_nucleus(scaled, top_p))), np.sort(kept))


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.5])
def test_what_is_certain_no_error_changes(temperature: float, top_p: float) -> None:
    """Logits off by the bound, at random and against the token: it stays. It is often certain, and not always."""
    random = np.random.default_rng(5)
    bound = 0.02
    found = 0
    for position in range(300):
        sampling = Sampling(temperature, top_p, 3)
        logits = (random.normal(size=400) * 2).astype(np.float32)
        token = choose(logits, sampling, position).token
        if not certain(logits, sampling, position, bound):
            continue
        found += 1
        # One error helps the others against the token, one pushes it out of the nucleus by its neighbours.
        against = np.where(np.arange(400) == token, -bound, bound)
        neighbours = np.where(np.abs(logits - logits[token]) < 3 * bound, bound, -bound)
        neighbours[token] = -bound
        for off in (against, neighbours, -neighbours, *random.choice([-bound, bound], (10, 400))):
            assert choose((logits + off).astype(np.float32), sampling, position).token == token
    assert 30 < found < 300
