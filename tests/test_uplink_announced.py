"""Which announced servers a device links to: real brokers, real statuses, real adverts."""

from __future__ import annotations

import os
import time
import zlib
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import pytest

import kinflow.uplink
from brokers import KINDS, running, wait_until
from kinflow.discovery import Advert, Browser, Node
from kinflow.family import Family
from kinflow.messages import Tier
from uplink_site import LOOPBACK, NOWHERE, FakeNode, chosen, found, make, order


@pytest.mark.parametrize("trouble", ["killed", "offline"])
def test_another_announced_server_takes_over(own_family: Family, trouble: str) -> None:
    """When the one in use is gone or says that it is offline the other one is asked at once.

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
        wait_until(lambda: set(order(uplink)) == set(brokers))
        first, second = order(uplink)
        if trouble == "killed":
            brokers[first].kill()
        else:
            nodes[first].say(state="offline")
        wait_until(lambda: order(uplink) == [second])


def test_a_server_that_is_no_longer_announced_is_let_go(own_family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, so that what is under way is still answered; what is announced again is linked again."""
    monkeypatch.setattr(kinflow.uplink, "RETIRE_S", 0.3)
    node = Node(f"a-{os.urandom(4).hex()}", "edge", LOOPBACK, 0, ((own_family.id, own_family.version),))
    with running(KINDS[0]) as broker, FakeNode(broker.address, own_family, "a"), ExitStack() as stack:
        uplink = make(own_family, "")
        uplink.start()
        stack.callback(uplink.close)
        for _ in range(2):
            with Advert(replace(node, port=broker.address.port), interfaces=[LOOPBACK]):
                wait_until(lambda: order(uplink) == ["a"])
            wait_until(lambda: order(uplink) == ["no server found yet"])
            assert uplink.peers == ()


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


def test_a_server_that_is_announced_but_dead_is_not_in_the_way(own_family: Family) -> None:
    """Of a nearer tier, announced, and nobody there: the one that works is asked all the time."""
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
        until_s = time.monotonic() + 2.0
        while time.monotonic() < until_s:
            assert order(uplink) == ["good"]
            time.sleep(0.01)


def test_a_crowd_of_false_announcements_does_not_hide_the_real_server(
    own_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are places, all of them before it in this client's order: it is found, and stays."""
    monkeypatch.setattr(kinflow.uplink, "TRIAL_S", 0.5)
    mine = ((own_family.id, own_family.version),)
    uplink = make(own_family, "")

    def place(node: Node) -> int:
        return zlib.crc32(f"{uplink._client_id}{node}".encode())

    with ExitStack() as stack:
        broker = stack.enter_context(running(KINDS[0]))
        stack.enter_context(FakeNode(broker.address, own_family, "good"))
        names = (f"n-{os.urandom(4).hex()}" for _ in count())
        real = next(
            n for name in names if place(n := Node(name, "edge", LOOPBACK, broker.address.port, mine)) > 1 << 31
        )
        ports = iter(range(10, 10 + kinflow.uplink.MAX_ANNOUNCED + 3))  # nobody listens there
        for port in ports:
            false = next(n for name in names if place(n := Node(name, "edge", LOOPBACK, port, mine)) < place(real))
            stack.enter_context(Advert(false, interfaces=[LOOPBACK]))
        uplink.start()
        stack.callback(uplink.close)
        wait_until(lambda: len(uplink._links) == kinflow.uplink.MAX_ANNOUNCED)
        stack.enter_context(Advert(real, interfaces=[LOOPBACK]))
        assert found(uplink, 20)
        until_s = time.monotonic() + 2.0
        while time.monotonic() < until_s:
            assert order(uplink) == ["good"]
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
        assert not found(uplink, 1.0)
        assert chosen(uplink) == "no server found yet"
        announce("edge", fits)
        assert found(uplink)
