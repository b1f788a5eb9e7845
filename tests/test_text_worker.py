"""The worker for language models with real graphs and frames; only the broker is a list that verdicts are added to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kinflow.frame import unpack
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.sampling import GREEDY, Sampling
from kinflow_edge.text import engine
from kinflow_edge.text.job import Feed
from kinflow_edge.text.model import ServedText
from text_bench import PROMPT, SAMPLED, Bench, at_work
from text_client import copy_tiny, plain


@pytest.fixture(scope="module")
def family(tiny: Path) -> TextFamily:
    return TextFamily.load(tiny)


@pytest.fixture(scope="module")
def bench(family: TextFamily) -> Iterator[Bench]:
    with at_work(family) as bench:
        yield bench


WAYS = [("s1", "int8", False), ("s1", "f16", False), ("s1", "f16", True), (IDS, IDS, False)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("split", "codec", "exact"), WAYS, ids=["int8", "f16", "exact", "ids"])
def test_verified_text_is_plain_text(
    bench: Bench, family: TextFamily, split: str, codec: str, exact: bool, sampling: Sampling
) -> None:
    """Drafted and verified, or one token at a time: the same tokens, whatever was drafted, and fewer passes."""
    ids = exact or split == IDS
    expected = plain(
        family, PROMPT, 60, sampling, codecs={} if ids else {"s1": codec}, device="float" if ids else "int8"
    )
    writer = bench.writer(split=split, codec=codec, exact=exact, sampling=sampling)
    assert writer.write(PROMPT, 60) == expected
    accepted = sum(verdict.accepted for verdict in writer.verdicts)
    assert accepted > 10
    assert len(writer.verdicts) < 50
    if not exact:
        layers = 6 if split == IDS else 4
        assert sum(verdict.layer_tokens for verdict in writer.verdicts) == layers * (
            len(PROMPT) + 4 * (len(writer.verdicts) - 1)
        )
        assert {verdict.passes for verdict in writer.verdicts} == {1}


def test_exact_redoes_what_is_close(tmp_path: Path, tiny: Path, family: TextFamily) -> None:
    """With a bound that everything is below, all is decided from token ids: still the same text, and it is counted."""
    shy = copy_tiny(tiny, tmp_path / "shy", margin_bound=1e6)
    with at_work(TextFamily.load(shy)) as bench:
        writer = bench.writer(codec="f16", exact=True)
        assert writer.write(PROMPT, 40) == plain(family, PROMPT, 40, device="float")
        decided = sum(verdict.accepted + 1 for verdict in writer.verdicts)
        assert sum(verdict.redone for verdict in writer.verdicts) == decided == bench.worker.stages.redone
        assert {verdict.passes for verdict in writer.verdicts} == {2}


def test_a_prompt_of_ids_is_not_computed_twice(tmp_path: Path, tiny: Path, family: TextFamily) -> None:
    """What came from token ids needs no redoing: only what came as features since is caught up with."""
    shy = copy_tiny(tiny, tmp_path / "shy", margin_bound=1e6)
    with at_work(TextFamily.load(shy)) as bench:
        writer = bench.writer(codec="f16", exact=True)
        writer._add(PROMPT)
        # Two drafts that nothing says: what was computed of them counts no more.
        sent = [*PROMPT, 3, 4]
        verify, _ = writer.request(0, len(PROMPT), split=IDS, codec=IDS, count=len(sent))
        writer.take(bench.ask(verify, np.array(sent, "<u4").tobytes()), len(PROMPT))
        assert writer.verdicts[0].accepted == 0
        verdict = writer.step()
        assert verdict.layer_tokens == (4 + 6) * 4
        assert writer.write(PROMPT, 20) == plain(family, PROMPT, 20, device="float")


def test_many_sessions_share_passes(family: TextFamily) -> None:
    """Verifications of all lengths and ways that wait together are computed together; each text is its own."""
    with at_work(family, batch_size=8) as bench:
        writers = [
            bench.writer(f"device-{number}", split=split, codec=codec, drafts=number % 4)
            for number in range(9)
            for split, codec, _ in [WAYS[number % 2 * 3]]
        ]
        prompts = [[11 * number + 3] * (2 + 5 * number) for number in range(9)]
        for writer, prompt in zip(writers, prompts, strict=True):
            writer.begin(prompt)
        before = bench.worker.batches.copy()
        threads = [
            threading.Thread(target=writer.write, args=(prompt, 30))
            for writer, prompt in zip(writers, prompts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(bench.worker.batches - before) > 1
        for number, (writer, prompt) in enumerate(zip(writers, prompts, strict=True)):
            ids = writer.split == IDS
            expected = plain(
                family, prompt, 30, codecs={} if ids else {"s1": "int8"}, device="float" if ids else "int8"
            )
            assert writer.tokens[len(prompt) : len(prompt) + 30] == expected, number


def test_a_long_prompt_lets_others_through(family: TextFamily) -> None:
    """It is computed in chunks: who comes after it is answered first, and its own text is the same."""
    prompt = [int(token) for token in np.random.default_rng(3).integers(3, 259, 400)]
    with at_work(family, sessions={"chunk": 16}) as bench:
        quick, slow = bench.writer("quick"), bench.writer("slow")
        quick.begin(PROMPT)
        slow._add(prompt)
        with bench.stuck():
            long = bench.send(*slow.request(0, len(prompt)))
            start = len(quick._coded)
            quick._add(quick.tokens[start:])
            short = bench.send(*quick.request(start, len(quick.tokens)))
        assert bench.one(short.id)
        verdict = bench.one(long.id)
        order = [unpack(data).message.id for _, data in bench.sent]
        assert order.index(short.id) < order.index(long.id)
        assert verdict.passes == 25
        slow.take(verdict, len(prompt))
        assert slow.write(prompt, 8) == plain(family, prompt, 8, codecs={"s1": "int8"})


def test_without_an_upstream_the_edges_own_exit_decides(family: TextFamily) -> None:
    """Another exit than the one that was asked for: degraded, and the text is exactly that exit's."""
    with at_work(family, "edge") as bench:
        writer = bench.writer()
        expected = plain(family, PROMPT, 30, exit="edge", codecs={"s1": "int8"})
        assert writer.write(PROMPT, 30) == expected
        assert {(verdict.exit, verdict.tier, verdict.degraded) for verdict in writer.verdicts} == {
            ("edge", "edge", True)
        }
        assert writer.verdicts[0].reason == "no upstream is set"
        asked = bench.writer(exit="edge")
        assert asked.write(PROMPT, 30) == expected
        assert not any(verdict.degraded for verdict in asked.verdicts)


def test_a_batch_changes_nothing_but_noise(family: TextFamily) -> None:
    """What comes out of ragged rows together is what comes out of each alone, to float accuracy."""
    model = ServedText.open(family, "cloud", 1)
    random = np.random.default_rng(0)

    def feeds(lengths: Sequence[int]) -> list[Feed]:
        made = []
        for number, length in enumerate(lengths):
            caches = model.caches()
            path = model.way(("s1", "s2", IDS)[number % 3], "cloud").path
            inputs = random.normal(size=(length + 3, 64)).astype(np.float32)
            ids = random.integers(3, 259, length + 3)
            before = Feed(path, caches, ids[:length] if path[0] == "lower" else inputs[:length])
            engine.run(model, [before], 1000)
            made.append(Feed(path, caches, ids[length:] if path[0] == "lower" else inputs[length:]))
        return made

    lengths = (1, 40, 7, 130, 3, 64)
    together = feeds(lengths)
    random = np.random.default_rng(0)
    alone = feeds(lengths)
    engine.run(model, together, 1000)
    for one, other in zip(together, alone, strict=True):
        engine.run(model, [other], 1000)
        np.testing.assert_allclose(one.outputs, other.outputs, atol=2e-5)
        for name in one.path:
            np.testing.assert_allclose(one.caches[name].past, other.caches[name].past, atol=2e-5)
