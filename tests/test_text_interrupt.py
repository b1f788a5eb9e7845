"""A verdict ends what it makes needless: the run under way, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinflow.fleet import Fleet
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.drafter import Array, DeviceModel, Drafter
from kinflow.text.family import TextFamily
from kinflow.text.fused import FusedRunner
from kinflow.text.manifest import Precision
from kinflow.text.sampling import GREEDY
from kinflow.text.segment import Interrupt, Interrupted
from kinflow_bench.reference import Reference
from kinflow_builder.text.tiny import write_tiny

LENGTH = 40
PROMPT = [5, 6, 7]
# How long a draft takes at most, if no verdict ends it: a round trip to a server on this machine is far shorter.
DRAFT_S = 0.1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def device(bundle: Path) -> Iterator[TextDevice]:
    """With a server that has all layers."""
    with Fleet([bundle]) as fleet:
        server = fleet.start("edge", "--member", "cloud", "--no-advertise")
        with TextDevice.open(bundle, DeviceSettings(broker=server.broker)) as device:
            assert device.wait_for_server(20)
            yield device


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_an_interrupted_run_leaves_nothing(bundle: Path, precision: Precision) -> None:
    """The text is as long as before, and goes on as if there had been no such run."""
    model = DeviceModel.open(TextFamily.load(bundle), precision, 1)
    drafter, other = Drafter(model), Drafter(model)
    for each in (drafter, other):
        each.begin(PROMPT)
    interrupt = Interrupt()
    interrupt.set()
    with pytest.raises(Interrupted):
        drafter.feed(99, interrupt)
    assert drafter.length == len(PROMPT)
    for token in (8, 9):
        np.testing.assert_array_equal(drafter.feed(token, Interrupt()), other.feed(token))
    np.testing.assert_array_equal(drafter.logits, other.logits)


def test_a_run_under_way_ends(bundle: Path) -> None:
    """From another thread, in the middle of it."""
    segment = TextFamily.load(bundle).segment("lower", "int8")
    past, interrupt, many = segment.past(), Interrupt(), np.full((1, 500), 9)

    def again_and_again() -> None:
        for _ in range(1000):
            segment.run(many, [past], interrupt=interrupt)
            past.crop(0)

    timer = threading.Timer(0.05, interrupt.set)
    timer.start()
    with pytest.raises(Interrupted):
        again_and_again()
    timer.join()
    assert past.length == 0


def test_a_refusal_ends_the_draft_and_a_verdict_that_agrees_does_not(
    device: TextDevice, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts that wait to be ended are, where the server says another token; the text is the reference's."""
    family = TextFamily.load(bundle)
    asked = device.tokenizer.chat([{"role": "user", "content": "Is it late?"}])
    text = asked + Reference(family, "int8", family.codec("s1", "int8")).decode(asked, LENGTH, GREEDY).tokens
    drafted: dict[int, int] = {}
    ended: list[bool] = []
    """Of each draft that a verdict ended: the text has it, and all drafts before it."""
    run = FusedRunner.run

    def slow(self: FusedRunner, tokens: Any, caches: Any, *, interrupt: Interrupt | None = None) -> Array:
        if interrupt is not None:
            at = caches[0].length
            drafted[at] = int(tokens[0, 0])
            until_s = time.monotonic() + DRAFT_S
            while time.monotonic() < until_s and not interrupt.is_set:
                time.sleep(0.001)
            if interrupt.is_set:
                ended.append(all(drafted.get(place, text[place]) == text[place] for place in range(at + 1)))
        return run(self, tokens, caches, interrupt=interrupt)

    monkeypatch.setattr(FusedRunner, "run", slow)
    generation = device.continue_from(asked, max_tokens=LENGTH, mode="family")
    said = [token.id for token in generation]
    assert asked + said == text
    assert not generation.summary.degraded
    assert len(ended) > 3
    assert not any(ended)
    assert len(ended) < len(drafted)
