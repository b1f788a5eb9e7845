"""One request and the servers it may go to: answered, silent, refusing, failing, probed. Real brokers."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import kinflow.uplink
from brokers import KINDS, TestBroker, running, wait_until
from kinflow import topics
from kinflow.errors import LinkTimeout, RequestCancelled, ServerFailed
from kinflow.estimate import FIRST_ROUND_TRIP_S
from kinflow.family import Family
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Cancel, Echo, Failure, Hop, Probe, Reply, Request, Tier
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.policy import Offload
from kinflow.resort import Resort
from kinflow.uplink import Uplink
from uplink_site import FakeNode, best, chosen, found, make, order


@pytest.fixture
def broker() -> Iterator[TestBroker]:
    """One of its own for each test: statuses are retained."""
    with running(KINDS[0]) as broker:
        yield broker


@pytest.fixture
def uplink(broker: TestBroker, own_family: Family) -> Iterator[Uplink]:
    uplink = make(own_family, str(broker.address))
    uplink.start()
    yield uplink
    uplink.close()


class Echoing(FakeNode):
    """A fake node that answers: requests after `delay_s` (None: never), probes at once unless it is `mute`."""

    def __init__(self, address: BrokerAddress, family: Family, node: str, tier: Tier = "edge") -> None:
        super().__init__(address, family, node, tier)
        self.delay_s: float | None = 0.0
        self.mute = False
        self.requests: list[Request] = []
        self.cancelled: list[bytes] = []
        self.connection = Connection(
            address,
            f"{tier}-{os.urandom(4).hex()}",
            on_message=self.serve,
            subscriptions=[topics.request_to(node, family.id, "s1", "+")],
        )

    def serve(self, _topic: str, data: bytes) -> None:
        message = unpack(data).message
        if isinstance(message, Cancel):
            self.cancelled.append(message.id)
        elif isinstance(message, Probe) and not self.mute:
            self.connection.publish(topics.reply(message.client), pack(Echo(message.id, self.status.node, 0.0)))
        elif isinstance(message, Request):
            self.requests.append(message)
            if self.delay_s is not None:
                self.connection.call_at(time.monotonic() + self.delay_s, lambda: self.answer(message))

    def answer(self, request: Request) -> None:
        hop = Hop(self.status.node, self.status.tier, 0.0, 0.0, 0.0, 0.0)
        reply = Reply(request.id, 0, 0.5, self.status.tier, "e", hops=[hop])
        self.connection.publish(topics.reply(request.client), pack(reply))


def ask(uplink: Uplink, remaining_s: float = 5.0) -> Resort:
    return uplink.request(Offload(best(uplink), "q8", ""), os.urandom(16), b"features", remaining_s)


def answering(resort: Resort) -> str:
    return resort.result().reply.hops[0].node


def test_a_request_reaches_its_node_and_teaches_the_way(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """It arrives as one of this family on the node's own topic, and its reply sets the round trip."""
    with Echoing(broker.address, own_family, "edge-1") as node:
        node.delay_s = 0.2
        assert found(uplink)
        answered = ask(uplink).result()
        (request,) = node.requests
        after = best(uplink).estimate
    assert (request.family, request.version, request.split) == (own_family.id, own_family.version, "s1")
    assert request.codec == "q8"
    assert 4000 < request.deadline_ms <= 5000
    assert answered.attempts == 1
    assert after.expected_s(200) > 0.1


def test_a_request_leaves_no_garbage(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """What it held is freed with it, its payload too, and not only when the garbage collector comes."""
    with Echoing(broker.address, own_family, "edge-1"):
        assert found(uplink)
        assert ask(uplink).result().reply.label == 0
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                ask(uplink).result()
            left = [each for each in gc.get_objects() if isinstance(each, Resort)]
        finally:
            gc.enable()
    assert len(left) <= 1


def test_a_silent_node_is_helped_out_by_the_next_and_told(
    broker: TestBroker, own_family: Family, uplink: Uplink
) -> None:
    """Past the usual time the next one is asked too; the first reply counts, the silent one gets a cancel."""
    with Echoing(broker.address, own_family, "a") as a, Echoing(broker.address, own_family, "b", "cloud") as b:
        a.delay_s = None
        wait_until(lambda: order(uplink) == ["a", "b"])
        resort = ask(uplink)
        assert answering(resort) == "b"
        assert resort.story == "a was silent, b was asked too"
        wait_until(lambda: a.cancelled == [request.id for request in a.requests])
        assert (len(a.requests), len(b.requests)) == (1, 1)
        assert a.requests[0].id[:-1] == b.requests[0].id[:-1]
        assert (a.requests[0].id[-1] + 1) % 256 == b.requests[0].id[-1]
        assert b.cancelled == []


def test_nobody_has_to_wait_for_a_silent_node(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """A server that escalates does not block: watched, the next node is asked all the same."""
    with Echoing(broker.address, own_family, "a") as a, Echoing(broker.address, own_family, "b", "cloud"):
        a.delay_s = None
        wait_until(lambda: order(uplink) == ["a", "b"])
        resort = ask(uplink)
        done = threading.Event()
        resort.add_done_callback(lambda _: done.set())
        resort.watch()
        assert done.wait(4)
        assert answering(resort) == "b"


def test_a_refusal_or_a_failure_is_passed_on_at_once(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """Busy, then failed, then answered: each in turn, and the story tells it."""
    with ExitStack() as stack:
        nodes = {
            name: stack.enter_context(Echoing(broker.address, own_family, name, tier))
            for name, tier in (("a", "edge"), ("b", "cloud"))
        }

        def refuse(request: Request) -> None:
            a.connection.publish(topics.reply(request.client), pack(refusal(request.id)))

        a = nodes["a"]
        wait_until(lambda: order(uplink) == ["a", "b"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(a, "answer", refuse)
            refusal: Any = lambda id_: Busy(id_, "a", 1.0)  # noqa: E731
            resort = ask(uplink)
            assert (answering(resort), resort.story) == ("b", "a: busy")
            refusal = lambda id_: Failure(id_, "a", "backend", "no")  # noqa: E731
            resort = ask(uplink)
            assert (answering(resort), resort.story) == ("b", "a: failed")
            nodes["b"].say(state="offline")
            wait_until(lambda: order(uplink) == ["a"])
            resort = ask(uplink)
            assert isinstance(resort.exception(), ServerFailed)


def test_an_abandoned_request_is_cancelled_everywhere(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """Whoever asked does not want it any more: it ends, and the node is told."""
    with Echoing(broker.address, own_family, "a") as a:
        a.delay_s = None
        assert found(uplink)
        resort = ask(uplink)
        wait_until(lambda: len(a.requests) == 1)
        resort.abandon()
        assert isinstance(resort.exception(1), RequestCancelled)
        wait_until(lambda: a.cancelled == [a.requests[0].id])


def test_a_node_that_fails_is_left_alone_and_used_again_when_it_answers(
    broker: TestBroker, own_family: Family, uplink: Uplink
) -> None:
    """Three silences open its breaker; no request goes there until a probe came back, within seconds."""
    with Echoing(broker.address, own_family, "a") as a:
        assert found(uplink)
        ask(uplink).result()
        a.delay_s, a.mute = None, True
        for _ in range(3):
            assert isinstance(ask(uplink, 0.4).exception(), LinkTimeout)
        assert "did not answer 3 times" in chosen(uplink)
        time.sleep(1.5)
        asked = len(a.requests)
        a.delay_s, a.mute = 0.0, False
        start_s = time.monotonic()
        wait_until(lambda: chosen(uplink) == "a")
        assert time.monotonic() - start_s < 5.0
        assert len(a.requests) == asked
        assert answering(ask(uplink)) == "a"


def test_an_idle_link_is_probed(
    broker: TestBroker, own_family: Family, uplink: Uplink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks, and still the way is measured: a first guess becomes a round trip."""
    monkeypatch.setattr(kinflow.uplink, "PROBE_INTERVAL_S", 0.1)
    with Echoing(broker.address, own_family, "a") as a:
        assert found(uplink)
        wait_until(lambda: best(uplink).estimate.round_trip_s != FIRST_ROUND_TRIP_S)
        assert a.requests == []
