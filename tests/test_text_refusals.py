"""What a text server refuses, gives up and survives."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers import wait_until
from kinflow.messages import Busy, Cancel, Echo, Failure, Probe, Verdict
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from text_bench import PROMPT, Bench, at_work


@pytest.fixture(scope="module")
def family(tiny: Path) -> TextFamily:
    return TextFamily.load(tiny)


@pytest.fixture(scope="module")
def bench(family: TextFamily) -> Iterator[Bench]:
    with at_work(family) as bench:
        yield bench


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
