"""Request and reply over real brokers: each answer finds its question, and what belongs nowhere is dropped."""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Iterator

import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow import topics
from kinflow.awaited import Answered
from kinflow.errors import FrameError, LinkError, LinkTimeout, RequestCancelled, ServerBusy, ServerFailed, SettingsError
from kinflow.frame import MAX_PAYLOAD_BYTES, pack, unpack
from kinflow.link import Link
from kinflow.messages import Busy, Cancel, Echo, Failure, NodeStatus, Probe, Release, Reply, Request, Verdict, Verify
from kinflow.mqtt import Connection
from link_site import TOPIC, Server, answer, keep_silent, make


@pytest.fixture(scope="module", params=KINDS)
def broker(request: pytest.FixtureRequest) -> Iterator[TestBroker]:
    with running(request.param) as broker:
        yield broker


@pytest.fixture
def link(broker: TestBroker) -> Iterator[Link]:
    with Link(broker.address, f"dev-{os.urandom(4).hex()}") as link:
        assert link.wait_connected(10)
        yield link


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
