"""The worker for language models with real graphs and frames; only the broker is a list that verdicts are added to."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers import wait_until
from kinflow import topics
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Cancel, Echo, Failure, Probe, Release, Verdict, Verify
from kinflow.settings import ServerSettings, SessionSettings
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.sampling import GREEDY, Sampling
from kinflow_edge.text import engine
from kinflow_edge.text.job import Feed
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.worker import TextWorker
from text_client import Writer, copy_tiny, plain

SAMPLED = Sampling(0.9, 0.95, 7)
PROMPT = [5, 17, 99, 230, 41, 8]


@dataclass
class Bench:
    """A worker at work, and what it published."""

    family: TextFamily
    worker: TextWorker
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)

    def publish(self, topic: str, data: bytes) -> None:
        assert self.open.wait(20)
        self.sent.append((topic, data))

    def send(self, verify: Verify, payload: bytes) -> Verify:
        topic = topics.request_to("node-1", verify.family, verify.split, verify.client)
        self.worker.on_message(topic, pack(verify, payload))
        return verify

    def tell(self, message: Release | Cancel | Probe) -> None:
        topic = topics.request_to("node-1", self.family.id, "s1", message.client)
        self.worker.on_message(topic, pack(message))

    def one(self, request_id: bytes, timeout_s: float = 20.0) -> Any:
        """The message for that request; there must be exactly one."""

        def found() -> list[Any]:
            messages = [unpack(data).message for _, data in list(self.sent)]
            return [message for message in messages if message.id == request_id]

        wait_until(found, timeout_s)
        (message,) = found()
        return message

    def ask(self, verify: Verify, payload: bytes) -> Any:
        return self.one(self.send(verify, payload).id)

    def writer(self, client: str = "device-1", **changes: Any) -> Writer:
        def ask(verify: Verify, payload: bytes) -> Verdict:
            answer = self.ask(verify, payload)
            assert isinstance(answer, Verdict), answer
            return answer

        return Writer(self.family, client, ask, **changes)

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """The worker's thread hangs: what comes meanwhile waits."""
        go = threading.Event()
        self.worker._inbox.put(lambda: go.wait(20) and None)
        try:
            yield
        finally:
            go.set()


@pytest.fixture(scope="module")
def family(tiny: Path) -> TextFamily:
    return TextFamily.load(tiny)


@contextmanager
def at_work(family: TextFamily, member: str = "cloud", **settings: Any) -> Iterator[Bench]:
    held = SessionSettings(**settings.pop("sessions", {}))
    bench = Bench(family, None)  # type: ignore[arg-type]
    bench.open.set()
    bench.worker = TextWorker(
        "node-1",
        "edge" if member == "edge" else "cloud",
        {family.id: ServedText.open(family, member, 1)},
        ServerSettings(sessions=held, **settings),
        publish=bench.publish,
        uplinks={},
        test_client="own-test",
    )
    bench.worker.start()
    try:
        yield bench
    finally:
        bench.open.set()
        bench.worker.close()


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


# Sessions


def test_a_session_that_is_not_there_is_lost(bench: Bench) -> None:
    """A server that forgot it says so, at once; begun again from 0, it goes on with the same text."""
    writer = bench.writer()
    expected = plain(bench.family, PROMPT, 20, codecs={"s1": "int8"})
    assert writer.write(PROMPT, 8) == expected[:8]
    bench.tell(Release(os.urandom(16), writer.client, writer.session))
    start = len(writer._coded)
    writer._add(writer.tokens[start:])
    failure = bench.ask(*writer.request(start, len(writer.tokens)))
    assert isinstance(failure, Failure)
    assert failure.code == "session-lost"
    writer.again()
    assert writer.write(PROMPT, 20) == expected


def test_an_older_start_crops_and_a_later_one_is_lost(bench: Bench) -> None:
    """Positions may be sent again, with other tokens; but a gap is not filled with anything."""
    writer = bench.writer(drafts=0)
    expected = plain(bench.family, PROMPT, 12, codecs={"s1": "int8"})
    writer.write(PROMPT, 12)
    assert writer.again(start=3).accepted == 0
    assert writer.tokens[len(PROMPT) : len(PROMPT) + 12] == expected
    length = len(writer._coded)
    assert length == len(PROMPT) + 12
    verify, payload = writer.request(length - 1, length)
    failure = bench.ask(msgspec.structs.replace(verify, start=length + 1, confirmed=length + 2), payload)
    assert failure.code == "session-lost"


def test_another_client_cannot_reach_a_session(bench: Bench) -> None:
    """Neither by its id, nor by releasing it, nor on the owner's topic."""
    writer = bench.writer("owner")
    writer.write(PROMPT, 5)
    start = len(writer._coded)
    writer._add(writer.tokens[start:])
    verify, payload = writer.request(start, len(writer.tokens), client="thief")
    assert bench.ask(verify, payload).code == "session-lost"
    before = bench.worker.desk.counts["failed:frame"]
    bench.worker.on_message(topics.request_to("node-1", "tiny", "s1", "owner"), pack(verify, payload))
    assert bench.worker.desk.counts["failed:frame"] == before + 1
    bench.tell(Release(os.urandom(16), "thief", writer.session))
    assert isinstance(bench.ask(*writer.request(start, len(writer.tokens))), Verdict)


def test_a_repeat_is_answered_from_memory(family: TextFamily) -> None:
    """The same id again: the same bytes, and nothing is computed."""
    with at_work(family) as bench:
        writer = bench.writer()
        writer._add(PROMPT)
        request = writer.request(0, len(PROMPT))
        bench.ask(*request)
        for _ in range(3):
            bench.send(*request)
        wait_until(lambda: len(bench.sent) == 4)
        assert len(set(bench.sent)) == 1
        assert bench.worker.batches.total() == 1
        assert bench.worker.desk.counts == {"served": 1, "repeated": 3}


def test_requests_of_one_session_are_computed_in_their_order(bench: Bench) -> None:
    """Two that wait at once build on each other."""
    writer = bench.writer(drafts=0)
    expected = plain(bench.family, PROMPT, 8, codecs={"s1": "int8"})
    writer.begin(PROMPT)
    start = len(writer._coded)
    for token in expected[1:4]:
        writer._add(writer.tokens[len(writer._coded) :])
        writer.tokens.append(token)
    requests = [writer.request(at, at + 1, count=1) for at in range(start, start + 3)]
    width = len(writer._coded[0])
    with bench.stuck():
        for at, (verify, _) in enumerate(requests):
            payload = np.array(writer.tokens[start + at : start + at + 1], "<u4").tobytes()
            bench.send(verify, payload + writer._coded[start + at][:width])
    assert [bench.one(verify.id).token for verify, _ in requests] == expected[1:4]


def test_a_first_draft_may_be_judged_by_the_last_verdict(bench: Bench) -> None:
    """start = confirmed: the token that the server said last needs no position of its own."""
    writer = bench.writer(drafts=0)
    expected = plain(bench.family, PROMPT, 8, codecs={"s1": "int8"})
    writer.begin(PROMPT)
    at = len(writer._coded)
    writer._add(writer.tokens[at:])
    verdict = bench.ask(*writer.request(at, at))
    assert (verdict.accepted, verdict.token) == (1, expected[1])
    assert len(verdict.probabilities) == 2
    lost = bench.ask(*writer.request(at, at, seed=5))
    assert lost.code == "session-lost"


def test_a_verdict_that_was_lost_is_asked_for_again(bench: Bench) -> None:
    """Under a new id, over the same positions, with other drafts: all of them are judged by what was sent now."""
    expected = plain(bench.family, PROMPT, 8, codecs={"s1": "int8"})
    writer = bench.writer()
    writer.begin(PROMPT)
    start, confirmed = len(writer._coded), len(writer.tokens)
    for drafts, accepted in (([3, 4, 5], 0), (expected[1:4], 3)):
        writer._lower.crop(start)
        writer._branch.crop(start)
        del writer._coded[start:], writer.tokens[confirmed:]
        writer._add(writer.tokens[start:])
        for draft in drafts:
            writer._add([draft], new=True)
        verdict = bench.ask(*writer.request(start, confirmed))
        assert (verdict.accepted, verdict.token) == (accepted, expected[accepted + 1])


def test_idle_sessions_expire(family: TextFamily) -> None:
    """Their caches are freed without a word from the client."""
    with at_work(family, sessions={"idle_s": 0.3}) as bench:
        bench.writer().write(PROMPT, 3)
        assert len(bench.worker.sessions) == 1
        assert bench.worker.sessions.cache_bytes > 0
        wait_until(lambda: len(bench.worker.sessions) == 0)
        assert bench.worker.sessions.expired == 1
        assert bench.worker.sessions.positions == bench.worker.sessions.cache_bytes == 0


@pytest.mark.parametrize("bound", [{"most": 2}, {"per_client": 2}])
def test_sessions_are_bounded(family: TextFamily, bound: dict[str, int]) -> None:
    """One more is refused while all are in use; one that was not used for a while makes room."""
    with at_work(family, sessions={**bound, "keep_s": 0.5}) as bench:
        first, second, third = (bench.writer() for _ in range(3))
        first.begin(PROMPT)
        second.begin(PROMPT)
        third._add(PROMPT)
        failure = bench.ask(*third.request(0, len(PROMPT)))
        assert (failure.code, failure.node) == ("session-limit", "node-1")
        own = bench.writer("own-test")
        assert isinstance(own.begin(PROMPT), Verdict)  # a full server is well
        bench.tell(Release(os.urandom(16), own.client, own.session))
        time.sleep(0.6)
        second.step()
        assert isinstance(bench.ask(*third.request(0, len(PROMPT))), Verdict)
        assert bench.worker.sessions.evicted == 1
        second.step()
        with pytest.raises(AssertionError, match="session-lost"):
            first.step()


def test_caches_are_bounded(family: TextFamily) -> None:
    """Memory counts, not only sessions: a text that does not fit is refused, the others go on."""
    long = [int(token) for token in np.random.default_rng(3).integers(3, 259, 500)]
    with at_work(family, sessions={"cache_mb": 1, "keep_s": 60.0}) as bench:
        first, second = bench.writer(), bench.writer()
        first.begin(long)
        second._add(long)
        failure = bench.ask(*second.request(0, len(long)))
        assert failure.code == "session-limit"
        assert "MB" in failure.message
        first.step()
        bench.tell(Release(os.urandom(16), first.client, first.session))
        assert isinstance(bench.ask(*second.request(0, len(long))), Verdict)


# What is refused


REFUSED = [
    ({"version": "0.9"}, "mismatch", "the request is for 0.9"),
    ({"split": "s9"}, "mismatch", "split 's9' is not served here"),
    ({"codec": "zip"}, "mismatch", "'zip'"),
    ({"exit": "moon"}, "mismatch", "exits"),
    ({"exit": "edge"}, "mismatch", "cannot be reached"),
    ({"split": IDS}, "mismatch", "unknown at 'ids'"),
    ({"exact": True}, "input", "float16"),
    ({"confirmed": 99}, "input", "confirmed is 99"),
    ({"start": 5, "confirmed": 4}, "input", "confirmed is 4"),
    ({"start": 600, "confirmed": 601}, "input", "context of 512"),
    ({"count": 5, "confirmed": 5}, "codec", "5 tokens"),
    ({"count": 500, "confirmed": 500}, "input", "500 tokens are 2000 bytes"),
]


@pytest.mark.parametrize(("changes", "code", "said"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_does_not_match_is_named(bench: Bench, changes: dict[str, Any], code: str, said: str) -> None:
    """Each with its code, and the worker goes on."""
    writer = bench.writer()
    writer._add(PROMPT)
    verify, payload = writer.request(0, len(PROMPT))
    failure = bench.ask(msgspec.structs.replace(verify, **changes), payload)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.node) == (code, "node-1"), failure
    assert said in failure.message
    assert isinstance(bench.ask(*writer.request(0, len(PROMPT))), Verdict)


def test_a_token_that_does_not_exist_is_refused(bench: Bench) -> None:
    """Before any graph looks it up."""
    writer = bench.writer(split=IDS, codec=IDS)
    writer._add(PROMPT)
    verify, _ = writer.request(0, len(PROMPT))
    failure = bench.ask(verify, np.array([*PROMPT[1:], 259], "<u4").tobytes())
    assert (failure.code, "259" in failure.message) == ("input", True)


def test_busy_when_the_deadline_would_be_missed(bench: Bench) -> None:
    """No time left is no work; a probe is answered past the queue."""
    writer = bench.writer()
    writer._add(PROMPT)
    assert isinstance(bench.ask(*writer.request(0, len(PROMPT), deadline_ms=0.0)), Busy)
    with bench.stuck():
        probe = Probe(os.urandom(16), "device-1")
        bench.tell(probe)
        assert isinstance(bench.one(probe.id), Echo)


def test_busy_when_the_queue_is_full(family: TextFamily) -> None:
    """As a whole, and for one client."""
    with at_work(family, queue_size=3, queue_size_per_device=2) as bench:
        requests = []
        for client in ("a", "a", "a", "b", "c"):
            writer = bench.writer(client)
            writer._add(PROMPT)
            requests.append(writer.request(0, len(PROMPT)))
        with bench.stuck():
            ids = [bench.send(*request).id for request in requests]
        kinds = [type(bench.one(id_)) for id_ in ids]
        assert kinds == [Verdict, Verdict, Busy, Verdict, Busy]
        assert bench.worker.under_way == 0


def test_what_expired_is_not_computed(family: TextFamily) -> None:
    """Its device went on alone: the session is as it was before."""
    with at_work(family) as bench:
        writer = bench.writer(drafts=0)
        writer.begin(PROMPT)
        start = len(writer._coded)
        writer._add(writer.tokens[start:])
        with bench.stuck():
            bench.send(*writer.request(start, start + 1, deadline_ms=200.0))
            time.sleep(0.3)
        wait_until(lambda: bench.worker.desk.counts["expired"] == 1)
        assert isinstance(bench.ask(*writer.request(start, start + 1)), Verdict)
        assert bench.worker.batches.total() == 2


def test_a_cancelled_request_is_undone(family: TextFamily) -> None:
    """Wherever it is; nobody else can cancel it."""
    with at_work(family) as bench:
        writer = bench.writer(drafts=0)
        writer.begin(PROMPT)
        start = len(writer._coded)
        writer._add(writer.tokens[start:])
        first, second = writer.request(start, start + 1), writer.request(start, start + 1)
        with bench.stuck():
            bench.send(*first)
            bench.send(*second)
            bench.tell(Cancel(first[0].id, "device-2"))
            bench.tell(Cancel(second[0].id, "device-1"))
        assert isinstance(bench.one(first[0].id), Verdict)
        wait_until(lambda: bench.worker.desk.counts["cancelled"] == 1)
        time.sleep(0.1)
        assert len(bench.sent) == 2
        assert bench.worker.under_way == 0


def test_closing_answers_what_was_admitted(family: TextFamily) -> None:
    """A server that is told to stop finishes first."""
    with at_work(family) as bench:
        writers = [bench.writer(f"device-{number}") for number in range(4)]
        requests = []
        for writer in writers:
            writer._add(PROMPT * 10)
            requests.append(writer.request(0, len(PROMPT) * 10))
        with bench.stuck():
            for request in requests:
                bench.send(*request)
    for verify, _ in requests:
        assert isinstance(bench.one(verify.id), Verdict)


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


@pytest.fixture(scope="module")
def hardened(family: TextFamily) -> Iterator[Bench]:
    """One worker for many hostile messages."""
    with at_work(family, sessions={"most": 4, "keep_s": 0.0}) as bench:
        yield bench


@given(st.data())
def test_no_message_stops_the_worker(hardened: Bench, data: st.DataObject) -> None:
    """Any numbers in any field, any payload: each gets one answer, and the next good request a verdict."""
    writer = hardened.writer()
    writer._add(PROMPT)
    verify, payload = writer.request(0, len(PROMPT))
    small = st.integers(0, 12)
    changes = {
        "start": small,
        "confirmed": small.map(lambda number: number + 1),
        "count": small.map(lambda number: number + 1),
        "split": st.sampled_from(["s1", "s2", IDS, "s9"]),
        "codec": st.sampled_from(["int8", "f16", IDS, "zip"]),
        "exit": st.sampled_from(["device", "edge", "cloud", "moon"]),
        "exact": st.booleans(),
        "session": st.sampled_from([bytes(16), verify.session]),
        "temperature": st.sampled_from([0.0, 1e-300, 0.7, 100.0]),
        "top_p": st.sampled_from([1e-300, 0.5, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
    }
    chosen = data.draw(st.fixed_dictionaries({}, optional=changes))
    damaged = data.draw(st.one_of(st.just(payload), st.binary(max_size=1000)))
    answer = hardened.ask(msgspec.structs.replace(verify, id=os.urandom(16), **chosen), damaged)
    assert isinstance(answer, (Verdict, Failure))
    assert not isinstance(answer, Failure) or answer.code != "internal", answer
    assert isinstance(hardened.ask(verify, payload), Verdict)


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
