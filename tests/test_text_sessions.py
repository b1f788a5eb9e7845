"""What a text server holds of its clients' generations, and for how long."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from brokers import wait_until
from kinflow import topics
from kinflow.frame import pack
from kinflow.messages import Failure, Release, Verdict, Verify
from kinflow.text.family import TextFamily
from text_bench import PROMPT, Bench, at_work
from text_client import Writer, plain


@pytest.fixture(scope="module")
def family(tiny: Path) -> TextFamily:
    return TextFamily.load(tiny)


@pytest.fixture(scope="module")
def bench(family: TextFamily) -> Iterator[Bench]:
    with at_work(family) as bench:
        yield bench


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


def followed(bench: Bench, wrong: int | None) -> tuple[Writer, Verify, Any, Verify, Any]:
    """Two verifications of one text, as if the second were sent before the first has its verdict.

    Drafts 1 and 2 are in the first one, 3 and 4 in the second; draft `wrong` falls.
    """
    writer = bench.writer(drafts=0)
    expected = plain(bench.family, PROMPT, 6, codecs={"s1": "int8"})
    writer.begin(PROMPT)
    start = len(PROMPT)
    text = [*PROMPT, *expected[:5]]
    if wrong is not None:
        text[start + wrong] = (text[start + wrong] + 1) % bench.family.manifest.vocabulary
    writer.tokens = text
    writer._add(text[start:])
    size = 4 + len(writer._coded[0])
    first, payload = writer.request(start, start + 1)
    cut = 3
    first = msgspec.structs.replace(first, count=cut)
    whole = np.array(text[start:], "<u4").tobytes(), b"".join(writer._coded[start:])
    payload = whole[0][: 4 * cut] + whole[1][: (size - 4) * cut]
    second, _ = writer.request(start + cut, start + cut)
    second = msgspec.structs.replace(second, follows=zlib.crc32(np.array(text[: start + cut], "<u4").tobytes()))
    return writer, first, payload, second, whole[0][4 * cut :] + whole[1][(size - 4) * cut :]


def test_what_follows_a_verification_goes_on_from_it(bench: Bench) -> None:
    """Sent together: the second one's first draft is the first one's token, and the text is plain decoding's."""
    _, first, payload, second, rest = followed(bench, None)
    bench.send(first, payload)
    verdict = bench.ask(second, rest)
    assert bench.one(first.id).accepted == 2
    assert verdict.accepted == 2
    assert verdict.token == plain(bench.family, PROMPT, 6, codecs={"s1": "int8"})[5]


@pytest.mark.parametrize("wrong", [2, 3])
def test_what_follows_a_fallen_draft_is_refused_and_costs_nothing(bench: Bench, wrong: int) -> None:
    """No pass, no damage: the same text goes on; nor does it count as a failure. So it is when it comes again late."""
    writer, first, payload, second, rest = followed(bench, wrong)
    verdict = bench.ask(first, payload)
    assert verdict.accepted == wrong - 1
    before = bench.worker.positions, bench.worker.desk.rejected
    assert bench.ask(second, rest).code == "superseded"
    assert (bench.worker.positions, bench.worker.desk.rejected) == before
    writer.take(verdict, first.confirmed)
    expected = plain(bench.family, PROMPT, 6, codecs={"s1": "int8"})
    assert writer.write(PROMPT, wrong + 1) == expected[: wrong + 1]
    late = msgspec.structs.replace(second, id=os.urandom(16))
    assert bench.ask(late, rest).code == "superseded"
    assert writer.write(PROMPT, 6) == expected


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
