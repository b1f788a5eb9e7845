"""The worker with real graphs and real frames; only the broker is a list that replies are appended to."""

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
from kinflow.confidence import read
from kinflow.errors import LinkLost
from kinflow.family import Family
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Cancel, Echo, Failure, NodeStatus, Probe, Reply, Request
from kinflow.preprocess import Preprocessor
from kinflow.settings import ServerSettings
from kinflow_bench import synthetic
from kinflow_edge.model import ServedFamily
from kinflow_edge.worker import Worker
from system_fixtures import copy_bundle, sample_images

TOPIC = "kinflow/v1/cloud/fashion/s1/req/cam-1"


@dataclass
class Wire:
    """What the worker publishes; `open` cleared, publishing waits, as it would on a broker that is stuck."""

    sent: list[tuple[str, bytes]] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    entered: int = 0
    batches: list[int] = field(default_factory=list)

    def publish(self, topic: str, data: bytes) -> None:
        self.entered += 1
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        self.sent.append((topic, data))

    def publish_all(self, messages: Sequence[tuple[str, bytes]]) -> None:
        self.batches.append(len(messages))
        for topic, data in messages:
            self.publish(topic, data)

    @property
    def messages(self) -> list[Any]:
        return [unpack(data).message for _, data in list(self.sent)]

    def one(self, request_id: bytes, timeout_s: float = 10.0) -> Any:
        """The message for that request; there must be exactly one."""
        wait_until(lambda: any(message.id == request_id for message in self.messages), timeout_s)
        found = [message for message in self.messages if message.id == request_id]
        assert len(found) == 1
        return found[0]


@dataclass
class Bench:
    """A worker at work and everything around it."""

    family: Family
    worker: Worker
    wire: Wire
    features: dict[str, np.ndarray]
    """By split: what the members below compute for a few images."""

    def request(self, *, split: str = "s1", codec: str = "", **changes: Any) -> Request:
        fields = {
            "id": os.urandom(16),
            "client": "device-1",
            "family": self.family.id,
            "version": self.family.version,
            "split": split,
            "codec": codec or self.family.codec(split).name,
            "deadline_ms": 20_000.0,
        }
        return Request(**{**fields, **changes})

    def payload(self, number: int = 0, split: str = "s1", codec: str = "") -> bytes:
        return self.family.codec(split, codec).encode(self.features[split][number])

    def send(self, request: Request, payload: bytes | None = None) -> Request:
        topic = topics.request("cloud", "fashion", request.split, request.client)
        self.worker.on_message(topic, pack(request, self.payload(split=request.split) if payload is None else payload))
        return request

    def ask(self, request: Request, payload: bytes | None = None) -> Any:
        return self.wire.one(self.send(request, payload).id)

    def expected(self, number: int, split: str = "s1", codec: str = "", member: str = "cloud") -> tuple[int, float]:
        """(label, confidence) of the member run directly on the features as they come out of the codec."""
        coder = self.family.codec(split, codec)
        inputs = coder.decode(coder.encode(self.features[split][number]))[None]
        output = self.family.member(member, source=split).run(inputs)
        reading = read(output.logits[0], self.family.manifest.exits[output.exit].temperature)
        return reading.label, reading.confidence

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """The worker's thread hangs in a reply: what comes meanwhile is queued."""
        self.wire.open.clear()
        before = self.wire.entered
        self.send(self.request())
        wait_until(lambda: self.wire.entered > before)
        try:
            yield
        finally:
            self.wire.open.set()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The committed family: every tier is a different member."""
    return Family.load(copy_bundle(tmp_path_factory.mktemp("worker") / "bundle", family="fashion"))


@pytest.fixture(scope="module")
def features(family: Family) -> dict[str, np.ndarray]:
    """Features of a few real images at the device's split."""
    prepare = Preprocessor(family.preprocess)
    first = family.member("device").run(np.concatenate([prepare(image) for image in sample_images(12)])).features
    assert first is not None
    return {"s1": first}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, dict[str, np.ndarray]]:
    """A family whose edge member has a split of its own, and features at both."""
    folder = tmp_path_factory.mktemp("chain") / "bundle"
    family = Family.load(synthetic.write(folder, synthetic.Shape(side=8, channels=2, chain=True)))
    images = np.random.default_rng(0).random((12, 1, 8, 8), np.float32)
    first = family.member("device").run(images).features
    assert first is not None
    second = family.member("edge", source="s1").run(first).features
    assert second is not None
    return family, {"s1": first, "s2": second}


@contextmanager
def at_work(family: Family, features: dict[str, np.ndarray], member: str = "cloud", **settings: Any) -> Iterator[Bench]:
    wire = Wire()
    wire.open.set()
    worker = Worker(
        "node-1",
        "edge" if member == "edge" else "cloud",
        {family.id: ServedFamily.open(family, member, 1)},
        ServerSettings(**settings),
        publish=wire.publish,
        publish_all=wire.publish_all,
        drive=lambda _done, _until_s: None,
        uplinks={},
        test_client="own-test",
    )
    worker.start()
    try:
        yield Bench(family, worker, wire, features)
    finally:
        wire.open.set()
        worker.close()


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


def test_a_repeat_is_answered_from_memory(bench: Bench) -> None:
    """A device that heard nothing asks again under the same id: the same bytes, computed once."""
    request = bench.request()
    bench.ask(request)
    computed = bench.worker.batches.total()
    for _ in range(3):
        bench.send(request)
    wait_until(lambda: len(bench.wire.sent) == 4)
    assert len(set(bench.wire.sent)) == 1
    assert bench.worker.batches.total() == computed == 1
    assert bench.worker.desk.counts == {"served": 1, "repeated": 3}


def test_a_repeat_while_the_first_is_computed_is_answered_once(bench: Bench) -> None:
    """The reply of the first serves the repeat too."""
    with bench.stuck():
        request = bench.send(bench.request())
        bench.send(request)
    assert isinstance(bench.wire.one(request.id), Reply)
    assert bench.worker.desk.counts["repeated"] == 1


def test_a_repeated_failure_is_the_same_failure(bench: Bench) -> None:
    """What could not be served is not tried again either."""
    request = bench.request(version="0.0.1")
    bench.send(request)
    bench.send(request)
    assert len(bench.wire.sent) == 2
    assert len(set(bench.wire.sent)) == 1
    assert bench.worker.desk.counts == {"failed:mismatch": 1, "repeated": 1}


def test_busy_when_the_queue_would_miss_the_deadline(bench: Bench) -> None:
    """Refused at once, with the length of the queue; one with more time is admitted, and so is a second try."""
    for _ in range(3):
        bench.ask(bench.request())
    before = len(bench.wire.sent)
    replies: list[bytes] = []
    with bench.stuck():
        time.sleep(0.4)  # the batch is overdue by that much: as much again is expected
        hurried, patient = bench.request(deadline_ms=100), bench.request(deadline_ms=15_000)
        publish = bench.worker.desk._publish
        bench.worker.desk._publish = lambda _topic, data: replies.append(data)  # Busy passes, though the wire is stuck
        bench.send(hurried)
        bench.worker.desk._publish = publish
        bench.send(patient)
    (busy,) = (unpack(data).message for data in replies)
    assert isinstance(busy, Busy)
    assert (busy.id, busy.node) == (hurried.id, "node-1")
    assert busy.queue_ms > 100
    assert isinstance(bench.wire.one(patient.id), Reply)
    assert isinstance(bench.ask(msgspec.structs.replace(hurried, deadline_ms=15_000)), Reply)
    assert bench.worker.desk.counts == {"served": before + 3, "busy": 1}
    assert bench.worker.desk.rejected == 1


def test_busy_when_the_queue_is_full(family: Family, features: dict[str, np.ndarray]) -> None:
    """The queue is bounded, whatever deadlines say."""
    with at_work(family, features, queue_size=2) as bench:
        with bench.stuck():
            queued = [bench.send(bench.request()) for _ in range(2)]
            refused: list[bytes] = []
            publish = bench.worker.desk._publish
            bench.worker.desk._publish = lambda _topic, data: refused.append(data)
            bench.send(bench.request())
            bench.worker.desk._publish = publish
        assert isinstance(unpack(refused[0]).message, Busy)
        for request in queued:
            assert isinstance(bench.wire.one(request.id), Reply)


def test_what_expired_in_the_queue_is_not_computed(bench: Bench) -> None:
    """Its device has answered by itself: computing it would only delay the others."""
    with bench.stuck():
        bench.send(bench.request(deadline_ms=300))
        alive = bench.send(bench.request())
        time.sleep(0.5)
    assert isinstance(bench.wire.one(alive.id), Reply)
    assert bench.worker.desk.counts == {"served": 2, "expired": 1}
    assert bench.worker.batches == {1: 2}


def test_a_deadline_of_nothing_is_busy(bench: Bench) -> None:
    """No time left at all: no graph is run for it."""
    assert isinstance(bench.ask(bench.request(deadline_ms=0)), Busy)
    assert not bench.worker.batches


def test_batches_form_under_load(family: Family, features: dict[str, np.ndarray]) -> None:
    """What has come while the worker was occupied is computed together, up to the batch size, each answer right."""
    with at_work(family, features, batch_size=4) as bench:
        with bench.stuck():
            requests = [bench.send(bench.request(), bench.payload(number)) for number in range(10)]
        for number, request in enumerate(requests):
            reply = bench.wire.one(request.id)
            label, confidence = bench.expected(number)
            assert (reply.label, reply.confidence) == (label, pytest.approx(confidence, abs=1e-4))
        assert bench.worker.batches == {1: 1, 4: 2, 2: 1}
        assert bench.wire.batches == [1, 4, 4, 2]  # its answers leave together


def test_a_batch_may_mix_splits(chain: tuple[Family, dict[str, np.ndarray]]) -> None:
    """Requests from devices and from edge servers wait in one queue; each continues from its own split."""
    with at_work(*chain, batch_size=16) as bench:
        with bench.stuck():
            requests = []
            for number in range(10):
                split = ("s1", "s2")[number % 2]
                requests.append(
                    bench.send(
                        bench.request(family="synthetic", split=split, codec="q8"), bench.payload(number, split, "q8")
                    )
                )
        for number, request in enumerate(requests):
            split = ("s1", "s2")[number % 2]
            reply = bench.wire.one(request.id)
            label, confidence = bench.expected(number, split)
            assert (reply.label, reply.confidence) == (label, pytest.approx(confidence, abs=1e-4))
        assert bench.worker.batches == {1: 1, 5: 2}


def test_threads_may_send_at_once(bench: Bench) -> None:
    """Several connections' threads bring requests: each is answered once."""
    requests: list[list[Request]] = [[] for _ in range(8)]

    def bring(mine: list[Request]) -> None:
        for number in range(25):
            mine.append(bench.send(bench.request(), bench.payload(number % 12)))

    threads = [threading.Thread(target=bring, args=(mine,)) for mine in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(bench.wire.sent) == 200)
    assert {message.id for message in bench.wire.messages} == {request.id for mine in requests for request in mine}
    assert bench.worker.desk.counts == {"served": 200}
    assert sum(size * times for size, times in bench.worker.batches.items()) == 200


def test_a_reply_that_cannot_be_sent_is_counted(bench: Bench) -> None:
    """The broker went away meanwhile: the worker counts it and goes on."""
    bench.wire.error = LinkLost("gone")
    bench.send(bench.request())
    wait_until(lambda: bench.worker.desk.counts["lost"] == 1)
    bench.wire.error = None
    assert isinstance(bench.ask(bench.request()), Reply)


def test_closing_answers_what_was_admitted(family: Family, features: dict[str, np.ndarray]) -> None:
    """A server that is told to stop finishes its queue first."""
    with at_work(family, features) as bench, bench.stuck():
        requests = [bench.send(bench.request()) for _ in range(5)]
    for request in requests:
        assert isinstance(bench.wire.one(request.id), Reply)


def test_the_load_is_the_time_spent_computing(bench: Bench) -> None:
    """It grows with each batch, and stands still between them."""
    for _ in range(3):
        bench.ask(bench.request())
    wait_until(lambda: bench.worker.queue_s > 0)
    wait_until(lambda: bench.worker.under_way == 0)
    spent_s = bench.worker.busy_s
    assert 0 < spent_s < 10
    time.sleep(0.05)
    assert bench.worker.busy_s == spent_s


def test_a_cancelled_request_is_not_computed(bench: Bench) -> None:
    """While it waits in the queue; nobody but its own client can cancel it, and it may be asked again."""
    with bench.stuck():
        wanted, unwanted = bench.send(bench.request()), bench.send(bench.request())
        bench.worker.on_message(topics.request("cloud", "f", "s1", "device-2"), pack(Cancel(wanted.id, "device-2")))
        bench.worker.on_message(topics.request("cloud", "f", "s1", "device-1"), pack(Cancel(unwanted.id, "device-1")))
        bench.worker.on_message(
            topics.request("cloud", "f", "s1", "device-1"), pack(Cancel(os.urandom(16), "device-1"))
        )
    assert isinstance(bench.wire.one(wanted.id), Reply)
    assert bench.worker.desk.counts == {"served": 2, "cancelled": 1}
    assert unwanted.id not in {message.id for message in bench.wire.messages}
    assert isinstance(bench.ask(unwanted), Reply)


def test_a_probe_is_echoed_past_the_queue(bench: Bench) -> None:
    """At once though the worker is stuck, with the queue that its client would meet."""
    bench.ask(bench.request())
    echoed: list[tuple[str, bytes]] = []
    probe = Probe(os.urandom(16), "device-9")
    with bench.stuck():
        publish = bench.worker.desk._publish
        bench.worker.desk._publish = lambda topic, data: echoed.append((topic, data))
        bench.worker.on_message(topics.request("cloud", "f", "s1", "device-9"), pack(probe, bytes(2048)))
        bench.worker.desk._publish = publish
    ((topic, data),) = echoed
    echo = unpack(data).message
    assert isinstance(echo, Echo)
    assert (topic, echo.id, echo.node) == (topics.reply("device-9"), probe.id, "node-1")
    assert echo.queue_ms > 0


def test_one_noisy_device_does_not_starve_the_others(family: Family, features: dict[str, np.ndarray]) -> None:
    """It fills its share and is told Busy; another one, coming last, is answered among the first."""
    with at_work(family, features, queue_size_per_device=20, batch_size=1) as bench:
        busy: list[bytes] = []
        with bench.stuck():
            noisy = [bench.send(bench.request(client="noisy")) for _ in range(20)]
            publish = bench.worker.desk._publish
            bench.worker.desk._publish = lambda _topic, data: busy.append(data)
            bench.send(bench.request(client="noisy"))
            bench.worker.desk._publish = publish
            quiet = bench.send(bench.request(client="quiet"))
        wait_until(lambda: len(bench.wire.sent) == 22)
        order = [message.id for message in bench.wire.messages]
        assert order.index(quiet.id) <= 3
        assert [order.index(request.id) for request in noisy] == sorted(order.index(request.id) for request in noisy)
        (refused,) = (unpack(data).message for data in busy)
        assert isinstance(refused, Busy)


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
