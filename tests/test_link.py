"""Request and reply over real brokers: each answer finds its question, and every future ends in time."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow import topics
from kinflow.awaited import Answered
from kinflow.errors import (
    FrameError,
    LinkError,
    LinkLost,
    LinkTimeout,
    RequestCancelled,
    ServerBusy,
    ServerFailed,
    SettingsError,
)
from kinflow.frame import MAX_PAYLOAD_BYTES, pack, unpack
from kinflow.link import Link
from kinflow.messages import (
    Busy,
    Cancel,
    Echo,
    Failure,
    NodeStatus,
    Probe,
    Release,
    Reply,
    Request,
    Verdict,
    Verify,
)
from kinflow.mqtt import BrokerAddress, Connection

TOPIC = topics.request("edge", "fam", "s1", "any")
# Generous: what is measured is that a future ends at its deadline and not seconds later.
LATE_S = 0.15

Serve = Callable[["Server", Request, bytes], None]


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


class Server:
    """What an edge server is to a link: a worker thread behind a queue."""

    def __init__(self, address: BrokerAddress, serve: Serve) -> None:
        self._serve = serve
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.seen: list[Request] = []
        self.connection = Connection(
            address,
            f"srv-{os.urandom(4).hex()}",
            on_message=lambda _topic, data: self._inbox.put(data),
            subscriptions=[topics.requests("edge", "fam", "s1", "edge")],
        )
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Server:
        self.connection.start()
        self._thread.start()
        assert self.connection.wait_connected(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()
        self.connection.close()

    def answer(self, request: Request, label: int = 0) -> None:
        self.send(request, Reply(id=request.id, label=label, confidence=0.5, tier="edge", exit="e"))

    def send(self, request: Request, message: Reply | Busy | Failure) -> None:
        self.connection.publish(topics.reply(request.client), pack(message))

    def _work(self) -> None:
        while (data := self._inbox.get()) is not None:
            request, payload = unpack(data)
            assert isinstance(request, Request)
            self.seen.append(request)
            self._serve(self, request, payload)


def make(link: Link, deadline_ms: float = 5000) -> Request:
    return Request(
        id=os.urandom(16),
        client=link.client,
        family="fam",
        version="1",
        split="s1",
        codec="c",
        deadline_ms=float(deadline_ms),
    )


def answer(server: Server, request: Request, payload: bytes) -> None:
    server.answer(request, label=len(payload))


def keep_silent(_server: Server, _request: Request, _payload: bytes) -> None:
    pass


def test_a_reply_comes_back_with_its_cost(broker: TestBroker, link: Link) -> None:
    """The answer holds the reply, whole payload sizes both ways and the time it took."""
    with Server(broker.address, answer):
        request = make(link)
        answered = link.request(TOPIC, request, bytes(1000)).result()
    assert isinstance(answered, Answered)
    assert (answered.reply.id, answered.reply.label) == (request.id, 1000)
    assert answered.bytes_up == len(pack(request, bytes(1000)))
    assert answered.bytes_down == len(pack(answered.reply))
    assert 0 < answered.round_trip_s < 5
    assert answered.attempts == 1


@pytest.mark.parametrize("right", [True, False], ids=["verdict", "reply"])
def test_a_verification_takes_a_verdict_alone(broker: TestBroker, link: Link, right: bool) -> None:
    """Its answer comes back like a reply; a Reply to it is dropped. A release just goes out."""
    topic = topics.request_to("node-1", "lm", "s1", link.client)
    came: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    server = Connection(
        broker.address,
        f"srv-{os.urandom(4).hex()}",
        on_message=lambda _topic, data: came.put(bytes(data)),
        subscriptions=[topics.request_to("node-1", "lm", "s1", "+")],
    )
    server.start()
    try:
        assert server.wait_connected(10)
        session = os.urandom(16)
        verify = Verify(
            os.urandom(16), link.client, "lm", "1", "s1", "int8", session, 0, 3, 4, "cloud", False, 0.0, 1.0, 0, 900.0
        )
        future = link.verify(topic, verify, b"abc")
        assert unpack(came.get(timeout=10)) == (verify, b"abc")
        verdict = Verdict(verify.id, 1, 17, [0.5, 0.25], "cloud", "cloud", "node-1")
        reply = Reply(id=verify.id, label=0, confidence=0.5, tier="cloud", exit="cloud")
        server.publish(topics.reply(link.client), pack(verdict if right else reply))
        if right:
            assert future.result().reply == verdict
        else:
            with pytest.raises(LinkTimeout):
                future.result()
            assert link.counters.malformed == 1
        link.release(topic, session)
        while not isinstance(release := unpack(came.get(timeout=10)).message, Release):
            assert release.id == verify.id  # a repeat
        assert (release.client, release.session) == (link.client, session)
    finally:
        server.close()


def test_replies_in_any_order_find_their_requests(broker: TestBroker, link: Link) -> None:
    """200 requests in flight whose replies come shuffled: each future gets its own label."""
    held: list[tuple[Request, int]] = []
    seen: set[bytes] = set()

    def hold_all_then_shuffle(server: Server, request: Request, payload: bytes) -> None:
        # The embedded broker now and then hands a shared subscription a message twice.
        if request.id in seen:
            return
        seen.add(request.id)
        held.append((request, len(payload)))
        if len(held) == 200:
            random.Random(7).shuffle(held)
            for held_request, size in held:
                server.answer(held_request, size)

    with Server(broker.address, hold_all_then_shuffle):
        futures = [link.request(TOPIC, make(link, 60_000), bytes(number)) for number in range(200)]
        assert [future.result(20).reply.label for future in futures] == list(range(200))


def test_many_threads_wait_at_once(broker: TestBroker, link: Link) -> None:
    """Sixteen threads that ask and wait, one driving the socket for all, each get their own answers."""
    wrong: list[int] = []

    def ask(number: int) -> None:
        for count in range(25):
            size = number * 100 + count
            if link.request(TOPIC, make(link, 20_000), bytes(size)).result(20).reply.label != size:
                wrong.append(size)

    with Server(broker.address, answer):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == []
    assert link.counters.answered == 400


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


def test_duplicate_late_and_foreign_replies_are_dropped(broker: TestBroker, link: Link) -> None:
    """Only the first reply to a request that still waits counts; all others are counted as unexpected."""

    def answer_too_much(server: Server, request: Request, _payload: bytes) -> None:
        server.answer(request, 1)
        server.answer(request, 2)
        server.send(request, Reply(id=os.urandom(16), label=3, confidence=0.5, tier="edge", exit="e"))
        server.send(request, Busy(id=request.id, node="n", queue_ms=1))

    with Server(broker.address, answer_too_much):
        assert link.request(TOPIC, make(link), b"").result().reply.label == 1
        wait_until(lambda: link.counters.unexpected == 3)
    assert link.counters.answered == 1


def test_busy_and_failure_become_errors(broker: TestBroker, link: Link) -> None:
    """What the server refuses arrives as ServerBusy and ServerFailed, with what it said."""

    def refuse(server: Server, request: Request, payload: bytes) -> None:
        busy = Busy(id=request.id, node="n1", queue_ms=120.0)
        failure = Failure(id=request.id, node="n1", code="mismatch", message="other version")
        server.send(request, failure if payload else busy)

    with Server(broker.address, refuse):
        with pytest.raises(ServerBusy, match="n1") as busy:
            link.request(TOPIC, make(link), b"").result()
        with pytest.raises(ServerFailed, match="other version") as failed:
            link.request(TOPIC, make(link), b"x").result()
    assert busy.value.queue_ms == 120.0
    assert (failed.value.node, failed.value.failure_code) == ("n1", "mismatch")


def test_garbage_on_the_reply_topic_is_survived(broker: TestBroker, link: Link) -> None:
    """Noise, truncated frames and messages that do not belong there are counted, and requests go on."""
    garbage = [b"", b"KINF", os.urandom(500), pack(Busy(id=bytes(16), node="n", queue_ms=0))[:-1]]

    def answer_after_garbage(server: Server, request: Request, _payload: bytes) -> None:
        for data in (*garbage, pack(request)):
            server.connection.publish(topics.reply(request.client), data)
        server.answer(request, 5)

    with Server(broker.address, answer_after_garbage):
        for _ in range(2):
            assert link.request(TOPIC, make(link), b"").result().reply.label == 5
    assert link.counters.malformed == 2 * (len(garbage) + 1)


def test_not_connected_fails_at_once() -> None:
    """Without a broker the future fails with LinkLost now, not at its deadline."""
    with Link(BrokerAddress("127.0.0.1", 9), "alone") as link:
        start_s = time.monotonic()
        with pytest.raises(LinkLost, match="not connected"):
            link.request(TOPIC, make(link, 30_000), b"").result()
        assert time.monotonic() - start_s < 5


def test_too_large_and_foreign_requests_are_refused(link: Link) -> None:
    """A payload over the limit is a FrameError, another client a LinkError."""
    with pytest.raises(FrameError, match="payload"):
        link.request(TOPIC, make(link), bytes(MAX_PAYLOAD_BYTES + 1))
    foreign = Request(bytes(16), "other", "fam", "1", "s1", "c", 100)
    with pytest.raises(LinkError, match="client"):
        link.request(TOPIC, foreign, b"")
    with pytest.raises(SettingsError):
        Link(link.address, "a/b")


def test_requests_in_flight_are_bounded(broker: TestBroker) -> None:
    """One more than allowed fails at once and says so; when one has ended there is room again."""
    with (
        Server(broker.address, keep_silent),
        Link(broker.address, "bounded", max_in_flight=2) as link,
    ):
        assert link.wait_connected(10)
        waiting = [link.request(TOPIC, make(link, 300), b"") for _ in range(2)]
        with pytest.raises(LinkError, match="2 are allowed"):
            link.request(TOPIC, make(link), b"").result()
        for future in waiting:
            assert isinstance(future.exception(), LinkTimeout)
        assert isinstance(link.request(TOPIC, make(link, 10), b"").exception(), LinkTimeout)


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


def test_nodes_are_what_their_status_says(broker: TestBroker, link: Link) -> None:
    """Ready and offline are kept as said, a removed status removes the node, a forged one is dropped."""
    told: queue.SimpleQueue[NodeStatus] = queue.SimpleQueue()
    ready = NodeStatus(node="n1", tier="edge", state="ready", queue_ms=3.0)
    offline = NodeStatus(node="n1", tier="edge", state="offline")
    with (
        Server(broker.address, keep_silent) as server,
        Link(broker.address, "watcher", on_status=told.put) as watcher,
    ):
        assert watcher.wait_connected(10)

        def say(data: bytes) -> None:
            server.connection.publish(topics.status("n1"), data, retain=True)

        say(pack(ready))
        assert told.get(timeout=10) == ready
        assert watcher.nodes == {"n1": ready}
        say(pack(NodeStatus(node="n2", tier="edge", state="ready")))
        say(pack(offline))
        assert told.get(timeout=10) == offline
        assert watcher.nodes == {"n1": offline}
        assert watcher.counters.malformed == 1
        say(b"")
        wait_until(lambda: not watcher.nodes)
    assert link.connected


def test_a_patient_request_is_repeated_later(broker: TestBroker, link: Link) -> None:
    """Silence is measured by what its sender expects of the way: then the repeat waits as long."""
    with Server(broker.address, keep_silent) as server:
        future = link.request(TOPIC, make(link, 900), b"x", repeat_after_s=0.6)
        assert isinstance(future.exception(), LinkTimeout)
        assert [request.deadline_ms > 300 for request in server.seen] == [True, False]


def test_a_cancelled_request_ends_and_its_server_is_told(broker: TestBroker, link: Link) -> None:
    """At once, with an error of its own; a reply that comes all the same is dropped."""
    told: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    with Connection(
        broker.address, f"srv-{os.urandom(4).hex()}", on_message=lambda *said: told.put(said), subscriptions=[TOPIC]
    ) as server:
        assert server.wait_connected(10)
        request = make(link)
        future = link.request(TOPIC, request, b"x")
        assert unpack(told.get(timeout=10)[1]).message == request
        link.cancel(request.id)
        assert isinstance(future.exception(1), RequestCancelled)
        assert unpack(told.get(timeout=10)[1]).message == Cancel(request.id, link.client)
        server.publish(topics.reply(link.client), pack(Reply(request.id, 0, 0.5, "edge", "e")))
        wait_until(lambda: link.counters.unexpected == 1)
        link.cancel(request.id)  # it has ended: nothing is sent


def test_a_probe_brings_an_echo_or_times_out(broker: TestBroker, link: Link) -> None:
    """Filled as asked, sent once, and measured."""
    seen: list[tuple[Probe, int]] = []

    def echo(_topic: str, data: bytes) -> None:
        probe, payload = unpack(data)
        assert isinstance(probe, Probe)
        seen.append((probe, len(payload)))
        if payload:
            server.publish(topics.reply(probe.client), pack(Echo(probe.id, "n1", 7.0)))

    server = Connection(broker.address, f"srv-{os.urandom(4).hex()}", on_message=echo, subscriptions=[TOPIC])
    with server:
        assert server.wait_connected(10)
        echoed = link.probe(TOPIC, 2048, 5.0).result()
        assert (echoed.echo.node, echoed.echo.queue_ms) == ("n1", 7.0)
        assert 2048 < echoed.bytes_up < 2048 + 200
        assert 0 < echoed.round_trip_s < 5
        assert isinstance(link.probe(TOPIC, 0, 0.3).exception(), LinkTimeout)
    assert [size for _, size in seen] == [2048, 0]


def test_a_lost_connection_forgets_the_nodes(own_broker: TestBroker) -> None:
    """What was ready before the broker died may be gone: only what says so again is."""
    with Link(own_broker.address, "watcher") as link, Server(own_broker.address, keep_silent) as server:
        server.connection.publish(topics.status("n1"), pack(NodeStatus("n1", "edge", "ready")), retain=True)
        wait_until(lambda: "n1" in link.nodes)
        own_broker.kill()
        wait_until(lambda: not link.connected)
        wait_until(lambda: link.nodes == {})
