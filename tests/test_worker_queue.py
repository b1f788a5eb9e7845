"""The worker's queue: repeats, batches, deadlines, refusals when there is too much, and what is left at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from brokers import wait_until
from kinflow import topics
from kinflow.family import Family
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Cancel, Echo, Probe, Reply, Request
from kinflow_bench import synthetic
from system_fixtures import copy_bundle
from worker_bench import Bench, at_work, device_features


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The committed family: every tier is a different member."""
    return Family.load(copy_bundle(tmp_path_factory.mktemp("worker") / "bundle", family="fashion"))


@pytest.fixture(scope="module")
def features(family: Family) -> dict[str, np.ndarray]:
    """Features of a few real images at the device's split."""
    return {"s1": device_features(family)}


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


@pytest.fixture
def bench(family: Family, features: dict[str, np.ndarray]) -> Iterator[Bench]:
    with at_work(family, features) as bench:
        yield bench


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
