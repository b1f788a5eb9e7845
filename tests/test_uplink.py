"""Which server a device asks: real brokers, real statuses, real adverts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from brokers import KINDS, TestBroker, running, wait_until
from kinflow.family import Family
from kinflow.messages import Served, Tier
from kinflow.policy import NoRoute, Rate
from kinflow.uplink import Uplink
from uplink_site import NOWHERE, RATES, FakeNode, best, chosen, connected, found, make, order


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


def test_the_order_of_resort_is_by_tier_then_by_expected_time(
    broker: TestBroker, own_family: Family, uplink: Uplink
) -> None:
    """The preferred tier wins over a shorter queue; in it the queue decides; statuses change the order."""
    tiers: dict[str, Tier] = {"cloud-1": "cloud", "edge-b": "edge", "edge-a": "edge"}
    with ExitStack() as stack:
        nodes = {
            name: stack.enter_context(FakeNode(broker.address, own_family, name, tier)) for name, tier in tiers.items()
        }
        nodes["edge-a"].say(queue_ms=30.0)
        nodes["edge-b"].say(queue_ms=500.0)
        wait_until(lambda: order(uplink) == ["edge-a", "edge-b", "cloud-1"])
        nodes["edge-a"].say(queue_ms=900.0)
        wait_until(lambda: order(uplink) == ["edge-b", "edge-a", "cloud-1"])
        nodes["edge-b"].say(state="draining")
        wait_until(lambda: order(uplink) == ["edge-a", "cloud-1"])
        nodes["edge-a"].say(state="failing")
        wait_until(lambda: order(uplink) == ["cloud-1"])
        nodes["edge-b"].say(state="ready")
        wait_until(lambda: order(uplink) == ["edge-b", "cloud-1"])


def test_a_route_says_all_that_the_policy_needs(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """Node, tier, split, the codecs it takes and the queue it reported."""
    with FakeNode(broker.address, own_family, "cloud-1", "cloud") as node:
        node.say(queue_ms=40.0, families=[Served(own_family.id, own_family.version, {"s1": ["q4", "other"]})])
        wait_until(lambda: chosen(uplink) == "cloud-1" and best(uplink).estimate.queue_s == 0.04)
        route = best(uplink)
    assert (route.node, route.tier, route.split) == ("cloud-1", "cloud", "s1")
    assert route.rates == (Rate("q4", 300.0),)


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
            {"families": [Served("FAMILY", "1.0.0", {"s1": ["q2"]})]},
            "node-1 does not take q8 or q4 at split s1",
        ),
        (
            {"families": [Served("FAMILY", "1.0.0", {"s2": ["q8"]})]},
            "node-1 does not take q8 or q4 at split s1",
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
        assert found(uplink)
        node.say(**changes)
        wait_until(lambda: chosen(uplink) != "node-1")
        assert uplink.routes("s1", RATES) == NoRoute(reason.replace("FAMILY", own_family.id))
        assert not found(uplink, 0.05)


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
        wait_until(lambda: best(uplink).estimate.queue_s == 0.007)
        assert order(uplink) == ["m-good"]


def test_why_there_is_no_route_before_any_server(broker: TestBroker, own_family: Family) -> None:
    """Not started, no connection, connected to a broker without servers: each says so."""
    uplink = make(own_family, str(NOWHERE))
    assert chosen(uplink) == "no server found yet"
    uplink.start()
    try:
        wait_until(lambda: chosen(uplink) == f"no connection to {NOWHERE}")
        start = time.monotonic()
        assert not found(uplink, 0.1)
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
        done.append((found(uplink, 30), time.monotonic()))

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: connected(uplink, broker))
    assert not done
    with FakeNode(broker.address, own_family, "edge-1"):
        came_s = time.monotonic()
        waiter.join(10)
    assert done
    was_found, found_s = done[0]
    assert was_found
    assert found_s - came_s < 2.0


def test_a_broker_that_comes_back_is_used_again(broker: TestBroker, own_family: Family, uplink: Uplink) -> None:
    """A broker named in the settings is never given up: down there is no route, and afterwards there is one."""
    with FakeNode(broker.address, own_family, "edge-1") as node:
        assert found(uplink)
        broker.kill()
        wait_until(lambda: chosen(uplink) == f"no connection to {broker.address}")
        broker.bring_back()
        assert node.connection.wait_connected(15)
        wait_until(lambda: node.connection.connected)
        node.say()
        assert found(uplink, 15)


def test_closing_leaves_no_thread(broker: TestBroker, own_family: Family) -> None:
    """Neither its own nor the link's."""
    before = set(threading.enumerate())
    uplink = make(own_family, str(broker.address))
    uplink.start()
    wait_until(lambda: connected(uplink, broker))
    uplink.close()
    wait_until(lambda: set(threading.enumerate()) <= before)
