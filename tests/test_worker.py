"""The worker with real graphs and real frames; only the broker is a list that replies are appended to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers import wait_until
from kinflow import topics
from kinflow.errors import LinkLost
from kinflow.family import Family
from kinflow.frame import pack
from kinflow.messages import Failure, NodeStatus, Reply
from system_fixtures import copy_bundle
from worker_bench import Bench, at_work, device_features

TOPIC = "kinflow/v1/cloud/fashion/s1/req/cam-1"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The committed family: every tier is a different member."""
    return Family.load(copy_bundle(tmp_path_factory.mktemp("worker") / "bundle", family="fashion"))


@pytest.fixture(scope="module")
def features(family: Family) -> dict[str, np.ndarray]:
    """Features of a few real images at the device's split."""
    return {"s1": device_features(family)}


@pytest.fixture
def bench(family: Family, features: dict[str, np.ndarray]) -> Iterator[Bench]:
    with at_work(family, features) as bench:
        yield bench


def test_the_answer_is_the_members_own(bench: Bench) -> None:
    """In every codec: the same as running the member on the decoded features."""
    for codec in bench.family.manifest.splits["s1"].codecs:
        for number in range(4):
            reply = bench.ask(bench.request(codec=codec), bench.payload(number, "s1", codec))
            assert isinstance(reply, Reply)
            label, confidence = bench.expected(number, "s1", codec)
            assert reply.label == label
            assert reply.confidence == pytest.approx(confidence, abs=1e-5)
            assert (reply.tier, reply.exit, reply.degraded) == ("cloud", "cloud", False)


def test_a_reply_goes_to_its_client_and_tells_what_it_cost(bench: Bench) -> None:
    """One reply topic per client; one hop with the times spent here."""
    reply = bench.ask(bench.request(client="device-42"))
    assert bench.wire.sent[0][0] == topics.reply("device-42")
    (hop,) = reply.hops
    assert (hop.node, hop.tier, hop.bytes_up) == ("node-1", "cloud", 0)
    assert 0 < hop.compute_ms <= hop.total_ms
    assert hop.decode_ms + hop.queue_ms + hop.compute_ms <= hop.total_ms
    assert bench.worker.desk.counts == {"served": 1}


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_without_an_upstream_an_edge_answers_all_by_choice(
    tmp_path: Path, features: dict[str, np.ndarray], threshold: float
) -> None:
    """Nothing above by the settings' choice is not degraded, sure or not."""
    family = Family.load(copy_bundle(tmp_path / "bundle", thresholds={"edge": threshold}))
    with at_work(family, features, "edge") as bench:
        reply = bench.ask(bench.request())
        assert (reply.tier, reply.exit, reply.degraded) == ("edge", "edge", False)
        assert (reply.reason == "confident") == (threshold == 0.0)


REFUSED = [
    ({"family": "other"}, "mismatch", "'other' is not served here"),
    ({"version": "0.0.1"}, "mismatch", "the request is for 0.0.1"),
    ({"split": "s9"}, "mismatch", "split 's9' is not served here"),
    ({"codec": "zip"}, "mismatch", "codec 'zip' is unknown at s1"),
]


@pytest.mark.parametrize(("changes", "code", "said"), REFUSED, ids=[next(iter(case[0])) for case in REFUSED])
def test_what_does_not_match_is_answered_with_its_name(
    bench: Bench, changes: dict[str, str], code: str, said: str
) -> None:
    """A device is told what differs, at once; the failure is counted under its code."""
    request = msgspec.structs.replace(bench.request(), **changes)
    failure = bench.ask(request, b"anything")
    assert isinstance(failure, Failure)
    assert (failure.code, failure.node) == (code, "node-1")
    assert said in failure.message
    assert bench.worker.desk.counts == {f"failed:{code}": 1}
    assert bench.worker.desk.rejected == 1
    assert isinstance(bench.ask(bench.request()), Reply)


def test_damaged_features_are_answered_with_a_codec_failure(bench: Bench) -> None:
    """Cut, empty, too long or of another codec: never a wrong answer, and the worker works on."""
    whole = bench.payload()
    damaged = [b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", bench.payload(codec="s1-q8")]
    for payload in damaged:
        failure = bench.ask(bench.request(codec="s1-q4"), payload)
        assert isinstance(failure, Failure), len(payload)
        assert failure.code == "codec"
    assert bench.worker.desk.counts == {"failed:codec": len(damaged)}
    assert isinstance(bench.ask(bench.request()), Reply)


def test_what_cannot_be_read_is_counted(bench: Bench) -> None:
    """No id and no client in it: nobody can be answered, but the operator sees it."""
    good = pack(bench.request(), bench.payload())
    foreign = pack(NodeStatus("x", "edge", "ready"))
    unreadable = [b"", b"\0", b"hello", good[:-1], good[:10], good + b"\0", b"XXXX" + good[4:], foreign]
    for data in unreadable:
        bench.worker.on_message(TOPIC, data)
    assert bench.worker.desk.counts == {"failed:frame": len(unreadable)}
    assert isinstance(bench.ask(bench.request()), Reply)
    assert len(bench.wire.sent) == 1


@pytest.fixture(scope="module")
def hardened(family: Family, features: dict[str, np.ndarray]) -> Iterator[Bench]:
    """One worker for thousands of hostile messages."""
    with at_work(family, features) as bench:
        yield bench


@given(st.data())
def test_no_message_stops_the_worker(hardened: Bench, data: st.DataObject) -> None:
    """Any bytes, and any damage to a good frame: it never raises, and the next good request is answered."""
    good = bytearray(pack(hardened.request(), hardened.payload()))
    if data.draw(st.booleans(), label="own bytes"):
        message = data.draw(st.binary(max_size=200))
    else:
        for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=4)):
            good[place] ^= data.draw(st.integers(1, 255))
        message = bytes(good)
    hardened.worker.on_message(TOPIC, message)
    assert isinstance(hardened.ask(hardened.request()), Reply)


@given(st.binary(max_size=600))
def test_no_features_stop_the_worker(hardened: Bench, payload: bytes) -> None:
    """A frame may be whole and its features anything: each gets a reply or a named failure."""
    answer = hardened.ask(hardened.request(), payload)
    assert isinstance(answer, Reply) or (isinstance(answer, Failure) and answer.code == "codec")


def test_a_reply_that_cannot_be_sent_is_counted(bench: Bench) -> None:
    """The broker went away meanwhile: the worker counts it and goes on."""
    bench.wire.error = LinkLost("gone")
    bench.send(bench.request())
    wait_until(lambda: bench.worker.desk.counts["lost"] == 1)
    bench.wire.error = None
    assert isinstance(bench.ask(bench.request()), Reply)


def test_the_servers_own_test_is_answered_here_and_not_counted(tmp_path: Path, features: dict[str, np.ndarray]) -> None:
    """Whatever its confidence; it is no request of a device's."""
    family = Family.load(copy_bundle(tmp_path / "bundle", thresholds={"edge": 1.0}))
    with at_work(family, features, "edge") as bench:
        reply = bench.ask(bench.request(client="own-test"))
        assert (reply.tier, reply.degraded) == ("edge", False)
        assert bench.worker.desk.counts == {}
        assert bench.worker.desk.last_request_s is None
        bench.ask(bench.request())
        assert bench.worker.desk.counts == {"served": 1}
        assert bench.worker.desk.last_request_s is not None
