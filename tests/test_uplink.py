"""Which server a device asks: real brokers, real statuses, real adverts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow import topics
from kinflow.discovery import Advert, Browser, Node
from kinflow.errors import LinkLost
from kinflow.family import Family
from kinflow.frame import pack, unpack
from kinflow.messages import Hop, NodeStatus, Reply, Request, Served, Tier
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.policy import NoRoute, Route
from kinflow.uplink import FIRST_ROUND_TRIP_S, GIVE_UP_S, PATIENCE_S, TRIAL_S, Uplink

LOOPBACK = "127.0.0.1"
NOWHERE = BrokerAddress(LOOPBACK, 9)


@pytest.fixture
def broker() -> Iterator[TestBroker]:
    """One of its own for each test: statuses are retained."""
    with running(KINDS[0]) as broker:
        yield broker


@pytest.fixture
def own_family(family: Family) -> Family:
    """Under an id that nobody else on this machine announces."""
    return replace(family, manifest=msgspec.structs.replace(family.manifest, id=f"test-{os.urandom(6).hex()}"))


class FakeNode:
    """What a server looks like from a device: a retained status, which can be changed."""

    def __init__(self, address: BrokerAddress, family: Family, node: str, tier: Tier = "edge") -> None:
        served = Served(family.id, family.version, {"s1": ["q8", "q4"]})
        self.status = NodeStatus(node, tier, "ready", families=[served])
        self.connection = Connection(address, f"{tier}-{os.urandom(4).hex()}", on_message=lambda _topic, _data: None)

    def __enter__(self) -> FakeNode:
        self.connection.start()
        assert self.connection.wait_connected(10)
        self.say()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def say(self, **changes: Any) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)
        self.connection.publish(topics.status(self.status.node), pack(self.status), retain=True)


def make(family: Family, broker: str, *, tiers: tuple[Tier, ...] = ("edge", "cloud"), codec: str = "q8") -> Uplink:
    return Uplink(
        family,
        "s1",
        codec,
        f"device-{os.urandom(4).hex()}",
        tiers=tiers,
        broker=broker,
        interfaces=[LOOPBACK],
    )


@pytest.fixture
def uplink(broker: TestBroker, own_family: Family) -> Iterator[Uplink]:
    uplink = make(own_family, str(broker.address))
    uplink.start()
    yield uplink
    uplink.close()


def chosen(uplink: Uplink) -> str:
    """The node, or why there is none."""
    route = uplink.route()
    return route.node if isinstance(route, Route) else route.reason


def connected(uplink: Uplink, broker: TestBroker) -> bool:
    """Before any server has said anything there."""
    return chosen(uplink) == f"no server at {broker.address}"


def test_a_server_is_chosen_by_tier_then_queue_then_name(
    broker: TestBroker, own_family: Family, uplink: Uplink
) -> None:
    """The preferred tier wins over a shorter queue, a shorter queue over a name; statuses change the choice."""
    tiers: dict[str, Tier] = {"cloud-1": "cloud", "edge-b": "edge", "edge-a": "edge"}
    with ExitStack() as stack:
        nodes = {
            name: stack.enter_context(FakeNode(broker.address, own_family, name, tier)) for name, tier in tiers.items()
        }
        nodes["edge-a"].say(queue_ms=30.0)
        nodes["edge-b"].say(queue_ms=30.0)
        wait_until(lambda: chosen(uplink) == "edge-a")
        nodes["edge-a"].say(queue_ms=31.0)
        wait_until(lambda: chosen(uplink) == "edge-b")
        nodes["edge-b"].say(state="offline")
        wait_until(lambda: chosen(uplink) == "edge-a")
        nodes["edge-a"].say(state="offline")
        wait_until(lambda: chosen(uplink) == "cloud-1")
        nodes["edge-b"].say(state="ready")
        wait_until(lambda: chosen(uplink) == "edge-b")


def test_a_route_says_all_that_the_policy_needs(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """Node, tier, split, codec, the queue the server reported and, before any reply, a first guess of the link."""
    with FakeNode(broker.address, own_family, "cloud-1", "cloud") as node:
        node.say(queue_ms=40.0)
        wait_until(lambda: chosen(uplink) == "cloud-1")
        wait_until(lambda: isinstance(r := uplink.route(), Route) and r.estimate.queue_s == 0.04)
        route = uplink.route()
    assert isinstance(route, Route)
    assert (route.node, route.tier, route.split, route.codec) == ("cloud-1", "cloud", "s1", "q8")
    assert route.estimate.round_trip_s == FIRST_ROUND_TRIP_S


def test_the_estimate_is_the_links_own_after_a_reply(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """A request along the route reaches the server as one of this family, and its reply sets the round trip."""
    seen: list[Request] = []

    def serve(_topic: str, data: bytes) -> None:
        request = unpack(data).message
        assert isinstance(request, Request)
        seen.append(request)
        hop = Hop("edge-1", "edge", 0.0, 0.0, 0.0, 0.0)
        server.publish(topics.reply(request.client), pack(Reply(request.id, 0, 0.5, "edge", "e", hops=[hop])))

    server = Connection(
        broker.address,
        f"edge-{os.urandom(4).hex()}",
        on_message=serve,
        subscriptions=[topics.shared_requests("edge", own_family.id, "s1")],
    )
    with server, FakeNode(broker.address, own_family, "edge-1"):
        assert server.wait_connected(10)
        assert uplink.wait(10)
        route = uplink.route()
        assert isinstance(route, Route)
        answered = uplink.request(route, b"i" * 16, b"", 5.0).result(6)
        after = uplink.route()
        with pytest.raises(LinkLost, match="elsewhere was just replaced"):
            uplink.request(msgspec.structs.replace(route, node="elsewhere"), b"j" * 16, b"", 5.0)
    (request,) = seen
    assert (request.id, request.family, request.version) == (b"i" * 16, own_family.id, own_family.version)
    assert (request.split, request.codec) == ("s1", "q8")
    assert 4000 < request.deadline_ms <= 5000
    assert isinstance(after, Route)
    assert after.estimate.round_trip_s == pytest.approx(answered.round_trip_s)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "offline"}, "node-1 is offline"),
        ({"tier": "device"}, "node-1 is of the tier device, edge or cloud is asked"),
        ({"families": []}, "node-1 does not serve FAMILY"),
        ({"families": [Served("other", "1.0.0", {"s1": ["q8"]})]}, "node-1 does not serve FAMILY"),
        (
            {"families": [Served("FAMILY", "2.0.0", {"s1": ["q8"]})]},
            "node-1 serves FAMILY 2.0.0, this is 1.0.0",
        ),
        (
            {"families": [Served("FAMILY", "1.0.0", {"s1": ["q4"]})]},
            "node-1 does not take q8 at split s1",
        ),
        (
            {"families": [Served("FAMILY", "1.0.0", {"s2": ["q8"]})]},
            "node-1 does not take q8 at split s1",
        ),
    ],
)
def test_a_server_that_cannot_be_asked_is_named_with_the_reason(
    broker: TestBroker, own_family: Family, uplink: Uplink, changes: dict[str, Any], reason: str
) -> None:
    """Offline, another tier, family, version, split or codec: NoRoute says which, and the server is not asked."""
    for served in changes.get("families", []):
        if served.family == "FAMILY":
            changes = {"families": [msgspec.structs.replace(served, family=own_family.id)]}
    with FakeNode(broker.address, own_family, "node-1") as node:
        assert uplink.wait(10)
        node.say(**changes)
        wait_until(lambda: isinstance(uplink.route(), NoRoute))
        assert uplink.route() == NoRoute(reason.replace("FAMILY", own_family.id))
        assert not uplink.wait(0.05)


def test_a_server_that_fits_is_found_among_those_that_do_not(
    broker: TestBroker, own_family: Family, uplink: Uplink
) -> None:
    """Others' trouble is not in the way, wherever they stand in the list."""
    with (
        FakeNode(broker.address, own_family, "a-off") as off,
        FakeNode(broker.address, own_family, "m-good", "cloud") as good,
        FakeNode(broker.address, own_family, "z-old") as old,
    ):
        off.say(state="offline")
        old.say(families=[Served(own_family.id, "0.9", {"s1": ["q8"]})])
        wait_until(lambda: chosen(uplink) == "m-good")
        # The last word comes after all the others: now they are known.
        good.say(queue_ms=7.0)
        wait_until(lambda: isinstance(r := uplink.route(), Route) and r.estimate.queue_s == 0.007)
        assert chosen(uplink) == "m-good"


def test_why_there_is_no_route_before_any_server(broker: TestBroker, own_family: Family) -> None:
    """Not started, no connection, connected to a broker without servers: each says so."""
    uplink = make(own_family, str(NOWHERE))
    assert uplink.route() == NoRoute("no server found yet")
    uplink.start()
    try:
        wait_until(lambda: chosen(uplink) == f"no connection to {NOWHERE}")
        start = time.monotonic()
        assert not uplink.wait(0.1)
        assert 0.09 < time.monotonic() - start < 1.0
    finally:
        uplink.close()

    uplink = make(own_family, str(broker.address))
    uplink.start()
    try:
        wait_until(lambda: connected(uplink, broker))
    finally:
        uplink.close()


def test_a_wait_ends_when_a_server_comes(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """Not at its timeout."""
    done: list[tuple[bool, float]] = []

    def wait() -> None:
        found = uplink.wait(30)
        done.append((found, time.monotonic()))

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: connected(uplink, broker))
    assert not done
    with FakeNode(broker.address, own_family, "edge-1"):
        came_s = time.monotonic()
        waiter.join(10)
    assert done
    found, found_s = done[0]
    assert found
    assert found_s - came_s < 2.0


def test_a_broker_that_comes_back_is_used_again(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """A broker named in the settings is never given up: down there is no route, and afterwards there is one."""
    with FakeNode(broker.address, own_family, "edge-1") as node:
        assert uplink.wait(10)
        broker.kill()
        wait_until(lambda: chosen(uplink) == f"no connection to {broker.address}")
        broker.bring_back()
        assert node.connection.wait_connected(15)
        wait_until(lambda: node.connection.connected)
        node.say()
        assert uplink.wait(15)


@pytest.mark.parametrize("trouble", ["killed", "offline"])
def test_another_announced_server_takes_over(own_family: Family, trouble: str) -> None:
    """When the one in use is gone or says that it is offline for GIVE_UP_S, the other one is asked.

    A server of another version and one that nobody answers for are announced too, and not in the way.
    """
    mine = ((own_family.id, own_family.version),)
    names = {name: f"{name}-{os.urandom(4).hex()}" for name in ("a", "b", "old")}
    with ExitStack() as stack:
        brokers = {names[name]: stack.enter_context(running(KINDS[0])) for name in ("a", "b")}
        nodes = {}
        for name, broker in brokers.items():
            nodes[name] = stack.enter_context(FakeNode(broker.address, own_family, name))
            advert = Node(name, "edge", LOOPBACK, broker.address.port, mine)
            stack.enter_context(Advert(advert, interfaces=[LOOPBACK]))
        old = Node(names["old"], "edge", LOOPBACK, NOWHERE.port, ((own_family.id, "0.1"),))
        stack.enter_context(Advert(old, interfaces=[LOOPBACK]))
        uplink = make(own_family, "")
        uplink.start()
        stack.callback(uplink.close)
        assert uplink.wait(10)
        first = chosen(uplink)
        (second,) = set(brokers) - {first}
        start = time.monotonic()
        if trouble == "killed":
            brokers[first].kill()
        else:
            nodes[first].say(state="offline")
        wait_until(lambda: isinstance(uplink.route(), NoRoute))
        wait_until(lambda: chosen(uplink) == second)
        assert GIVE_UP_S * 0.9 < time.monotonic() - start < GIVE_UP_S + 5


def test_closing_leaves_no_thread(broker: TestBroker, own_family: Family) -> None:
    """Neither its own nor the link's."""
    before = set(threading.enumerate())
    uplink = make(own_family, str(broker.address))
    uplink.start()
    wait_until(lambda: connected(uplink, broker))
    uplink.close()
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_nearer_tier_is_preferred_whenever_it_is_announced(own_family: Family) -> None:
    """A cloud server alone is used; an edge server that is announced later takes over, and stays."""
    mine = ((own_family.id, own_family.version),)
    with ExitStack() as stack:

        def announce(name: str, tier: Tier) -> None:
            broker = stack.enter_context(running(KINDS[0]))
            stack.enter_context(FakeNode(broker.address, own_family, name, tier))
            advert = Node(f"{name}-{os.urandom(4).hex()}", tier, LOOPBACK, broker.address.port, mine)
            stack.enter_context(Advert(advert, interfaces=[LOOPBACK]))

        announce("a-cloud", "cloud")
        uplink = make(own_family, "")
        uplink.start()
        stack.callback(uplink.close)
        wait_until(lambda: chosen(uplink) == "a-cloud")
        announce("z-edge", "edge")
        wait_until(lambda: chosen(uplink) == "z-edge")


def test_a_server_that_is_announced_but_dead_does_not_replace_one_that_works(own_family: Family) -> None:
    """A new link must work before the old one is left: meanwhile there is a route all the time."""
    mine = ((own_family.id, own_family.version),)
    with ExitStack() as stack:
        broker = stack.enter_context(running(KINDS[0]))
        stack.enter_context(FakeNode(broker.address, own_family, "good", "cloud"))
        good = Node(f"good-{os.urandom(4).hex()}", "cloud", LOOPBACK, broker.address.port, mine)
        stack.enter_context(Advert(good, interfaces=[LOOPBACK]))
        uplink = make(own_family, "")
        uplink.start()
        stack.callback(uplink.close)
        wait_until(lambda: chosen(uplink) == "good")
        dead = Node(f"dead-{os.urandom(4).hex()}", "edge", LOOPBACK, NOWHERE.port, mine)
        stack.enter_context(Advert(dead, interfaces=[LOOPBACK]))
        until_s = time.monotonic() + TRIAL_S + 0.5
        while time.monotonic() < until_s:
            assert chosen(uplink) == "good"
            time.sleep(0.01)


def test_adverts_that_do_not_fit_are_not_followed(own_family: Family) -> None:
    """Another family, version or tier in an advert: its broker is left alone, though a server there would do."""
    fits = (own_family.id, own_family.version)
    with ExitStack() as stack:
        broker = stack.enter_context(running(KINDS[0]))
        stack.enter_context(FakeNode(broker.address, own_family, "good"))

        def announce(tier: Tier, served: tuple[str, str]) -> str:
            node = Node(f"{tier}-{os.urandom(4).hex()}", tier, LOOPBACK, broker.address.port, (served,))
            stack.enter_context(Advert(node, interfaces=[LOOPBACK]))
            return node.node

        foreign = {
            announce("edge", (own_family.id, "0.1")),
            announce("edge", ("other", own_family.version)),
            announce("device", fits),
        }
        browser = stack.enter_context(Browser(interfaces=[LOOPBACK]))
        uplink = make(own_family, "")
        uplink.start()
        stack.callback(uplink.close)
        wait_until(lambda: foreign <= {node.node for node in browser.nodes()})
        assert not uplink.wait(PATIENCE_S + 0.5)
        assert uplink.route() == NoRoute("no server found yet")
        announce("edge", fits)
        assert uplink.wait(10)
