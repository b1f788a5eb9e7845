"""The link when no reply comes: repeats, deadlines, brokers that die. Every future ends in time."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator

import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow import topics
from kinflow.errors import LinkLost, LinkTimeout
from kinflow.frame import pack
from kinflow.link import Link
from kinflow.messages import NodeStatus, Request
from kinflow.mqtt import BrokerAddress
from link_site import TOPIC, Server, answer, keep_silent, make

# Generous: what is measured is that a future ends at its deadline and not seconds later.
LATE_S = 0.15


@pytest.fixture(scope="module", params=KINDS)
def broker(request: pytest.FixtureRequest) -> Iterator[TestBroker]:
    with running(request.param) as broker:
        yield broker


@pytest.fixture(params=KINDS)
def own_broker(request: pytest.FixtureRequest) -> Iterator[TestBroker]:
    """For tests that kill it."""
    with running(request.param) as broker:
        yield broker


@pytest.fixture
def link(broker: TestBroker) -> Iterator[Link]:
    with Link(broker.address, f"dev-{os.urandom(4).hex()}") as link:
        assert link.wait_connected(10)
        yield link


@pytest.mark.parametrize("deadline_ms", [0, 30, 300])
@pytest.mark.parametrize("wait", ["result", "callback"])
def test_silence_ends_at_the_deadline(broker: TestBroker, link: Link, deadline_ms: int, wait: str) -> None:
    """A server says nothing: the future fails with LinkTimeout at its deadline, waited for or not."""
    with Server(broker.address, keep_silent):
        ended: queue.SimpleQueue[float] = queue.SimpleQueue()
        start_s = time.monotonic()
        future = link.request(TOPIC, make(link, deadline_ms), b"x")
        future.add_done_callback(lambda _: ended.put(time.monotonic()))
        if wait == "result":
            with pytest.raises(LinkTimeout, match="no reply"):
                future.result()
        took_s = ended.get(timeout=5) - start_s
    assert isinstance(future.exception(), LinkTimeout)
    assert deadline_ms / 1e3 <= took_s < deadline_ms / 1e3 + LATE_S


def test_each_request_has_its_own_deadline(broker: TestBroker, link: Link) -> None:
    """One timer looks after all: whatever their order, they are repeated and end as if they were alone."""
    deadlines_s = (1.2, 0.3, 0.9, 0.6)
    ended: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    with Server(broker.address, keep_silent) as server:
        start_s = time.monotonic()
        for number, deadline_s in enumerate(deadlines_s):
            future = link.request(TOPIC, make(link, int(deadline_s * 1e3)), b"x")
            future.add_done_callback(lambda _, number=number: ended.put((number, time.monotonic() - start_s)))
        for number in (1, 3, 2, 0):
            first, took_s = ended.get(timeout=5)
            assert first == number
            assert deadlines_s[number] <= took_s < deadlines_s[number] + LATE_S
        assert len(server.seen) == 2 * len(deadlines_s)


def test_answered_requests_leave_no_timers(broker: TestBroker, link: Link) -> None:
    """However many were answered, their network thread has one call to make."""
    with Server(broker.address, answer):
        for _ in range(50):
            link.request(TOPIC, make(link), b"x").result()
    assert len(link.connection._timers._heap) == 1


def test_a_request_without_reply_is_repeated_once(broker: TestBroker, link: Link) -> None:
    """A lost request goes out again after a third of its deadline: same id, less time left, both counted."""

    def answer_the_second(server: Server, request: Request, _payload: bytes) -> None:
        if len(server.seen) == 2:
            server.answer(request, 2)

    with Server(broker.address, answer_the_second) as server:
        answered = link.request(TOPIC, make(link, 600), b"x").result()
        assert answered.reply.label == 2
        first, second = server.seen
    assert first.id == second.id
    assert first.deadline_ms == 600
    assert 100 < second.deadline_ms <= 400
    assert answered.bytes_up == len(pack(first, b"x")) + len(pack(second, b"x"))
    assert link.counters.retried == 1
    assert answered.attempts == 2


def test_a_patient_request_is_repeated_later(broker: TestBroker, link: Link) -> None:
    """Silence is measured by what its sender expects of the way: then the repeat waits as long."""
    with Server(broker.address, keep_silent) as server:
        future = link.request(TOPIC, make(link, 900), b"x", repeat_after_s=0.6)
        assert isinstance(future.exception(), LinkTimeout)
        assert [request.deadline_ms > 300 for request in server.seen] == [True, False]


def test_not_connected_fails_at_once() -> None:
    """Without a broker the future fails with LinkLost now, not at its deadline."""
    with Link(BrokerAddress("127.0.0.1", 9), "alone") as link:
        start_s = time.monotonic()
        with pytest.raises(LinkLost, match="not connected"):
            link.request(TOPIC, make(link, 30_000), b"").result()
        assert time.monotonic() - start_s < 5


def test_a_request_survives_the_broker(own_broker: TestBroker) -> None:
    """The broker is killed with a request in flight and comes back: the same request is answered."""
    arrived = threading.Event()

    def answer_the_second(server: Server, request: Request, _payload: bytes) -> None:
        arrived.set()
        if len(server.seen) > 1:
            server.answer(request, 9)

    with (
        Server(own_broker.address, answer_the_second) as server,
        Link(own_broker.address, "survivor") as link,
    ):
        assert link.wait_connected(10)
        future = link.request(TOPIC, make(link, 15_000), b"precious")
        assert arrived.wait(10)
        own_broker.kill()
        wait_until(lambda: not link.connected)
        own_broker.bring_back()
        # The link may be back before the server: its first retry is then lost, and the next one must do.
        assert future.result(20).reply.label == 9
        assert len({request.id for request in server.seen}) == 1


def test_a_broker_that_stays_away_fails_the_request_in_time(own_broker: TestBroker) -> None:
    """When the connection does not come back the future fails with LinkLost at its deadline."""
    with Server(own_broker.address, keep_silent), Link(own_broker.address, "orphan") as link:
        assert link.wait_connected(10)
        start_s = time.monotonic()
        future = link.request(TOPIC, make(link, 700), b"")
        own_broker.kill()
        assert isinstance(future.exception(), LinkLost)
        assert 0.7 <= time.monotonic() - start_s < 0.7 + LATE_S


def test_close_ends_what_waits(broker: TestBroker) -> None:
    """Closing the link fails the requests that still wait and leaves no thread behind."""
    before = threading.active_count()
    with Link(broker.address, "closing") as link:
        assert link.wait_connected(10)
        future = link.request(TOPIC, make(link, 60_000), b"")
    assert isinstance(future.exception(), LinkLost)
    assert threading.active_count() == before


def test_a_lost_connection_forgets_the_nodes(own_broker: TestBroker) -> None:
    """What was ready before the broker died may be gone: only what says so again is."""
    with Link(own_broker.address, "watcher") as link, Server(own_broker.address, keep_silent) as server:
        server.connection.publish(topics.status("n1"), pack(NodeStatus("n1", "edge", "ready")), retain=True)
        wait_until(lambda: "n1" in link.nodes)
        own_broker.kill()
        wait_until(lambda: not link.connected)
        wait_until(lambda: link.nodes == {})
