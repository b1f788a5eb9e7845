"""The device's own model on one text: features at once, its exit only when it is asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kinflow.text.cache import FIRST_CAPACITY, Cache
from kinflow.text.drafter import Array, DeviceModel, Drafter
from kinflow.text.family import TextFamily
from kinflow_builder.text.tiny import write_tiny

PROMPT, MORE = [5, 6, 7], [8, 9, 10, 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeviceModel:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny(folder, seed=0)
    return DeviceModel.open(TextFamily.load(folder), "int8", 1)


def fed(model: DeviceModel, tokens: list[int], *, asked: bool) -> Drafter:
    """A text of the prompt and `tokens`, its exit asked after every one or never."""
    drafter = Drafter(model)
    drafter.begin(PROMPT)
    for token in tokens:
        if asked:
            assert drafter.logits.shape == (model.family.manifest.vocabulary,)
        drafter.feed(token)
    return drafter


def test_the_exit_catches_up(model: DeviceModel) -> None:
    """Asked late or after every token, it says the same; and what it said once is not computed again."""
    late, always = (fed(model, MORE, asked=asked) for asked in (False, True))
    np.testing.assert_allclose(late.logits, always.logits, atol=1e-4)
    assert late.logits is late.logits


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("asked", [False, True])
def test_after_a_crop_the_exit_speaks_of_what_is_left(model: DeviceModel, kept: int, asked: bool) -> None:
    """Drafts that fell leave nothing behind, whether the exit had read them or not."""
    drafter = fed(model, MORE, asked=asked)
    if asked:
        assert drafter.logits.any()
    drafter.crop(len(PROMPT) + kept)
    assert drafter.length == len(PROMPT) + kept
    np.testing.assert_allclose(drafter.logits, fed(model, MORE[:kept], asked=True).logits, atol=1e-4)
    drafter.feed(12)
    np.testing.assert_allclose(drafter.logits, fed(model, [*MORE[:kept], 12], asked=True).logits, atol=1e-4)


def test_features_do_not_depend_on_who_asked(model: DeviceModel) -> None:
    """Bit by bit: they are what the text is made of."""
    late, always = (fed(model, MORE, asked=asked) for asked in (False, True))
    np.testing.assert_array_equal(late.feed(12), always.feed(12))


def test_nobody_computes_an_exit_that_is_not_asked(model: DeviceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text whose every token a server says costs the device its layers alone."""
    runs: list[int] = []
    run = model.branch.run

    def counted(tokens: Array, caches: Sequence[Cache]) -> Array:
        runs.append(tokens.shape[1])
        return run(tokens, caches)

    monkeypatch.setattr(model.branch, "run", counted)
    drafter = fed(model, MORE, asked=False)
    assert runs == []
    assert drafter.logits.any()
    assert runs == [len(PROMPT) + len(MORE)]


def test_a_text_outgrows_its_memory(model: DeviceModel) -> None:
    """Keys and values move into more of it, several times, and stay what they are."""
    tokens = np.random.default_rng(0).integers(3, 100, 300).tolist()
    one_by_one = Drafter(model)
    one_by_one.begin(tokens[:3])
    grown = [one_by_one.feed(token) for token in tokens[3:]]
    at_once = Drafter(model).begin(tokens)
    # Sums in another order are rounded to other ones of 8 bits here and there.
    error = np.square(np.concatenate(grown) - at_once[3:]).mean() / np.square(at_once).mean()
    assert error**0.5 < 0.01
    assert len(grown) > 4 * FIRST_CAPACITY


def test_what_is_likely_is_what_the_exit_says(model: DeviceModel) -> None:
    """The shortlist's tokens have the logits of the whole head, at every length, and are forgotten with it."""
    drafter = fed(model, MORE, asked=False)
    for _ in range(3):
        likely = drafter.likely()
        assert likely is not None
        np.testing.assert_allclose(likely.logits, drafter.logits[likely.tokens], atol=0.2)
        assert likely.best(1.0)[0] in likely.tokens
        drafter.crop(drafter.length - 1)
