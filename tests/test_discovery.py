"""Adverts and browsers on real sockets over loopback, and what they do with what strangers announce."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import zeroconf

from kinflow import advert, discovery
from kinflow.discovery import Advert, Browser, Node
from kinflow.errors import DiscoveryError

LOOPBACK = ("127.0.0.1",)
TIMEOUT_S = 10.0


def unique() -> str:
    return f"test-{os.urandom(6).hex()}"


def node(name: str, **changes: object) -> Node:
    values: dict[str, object] = {
        "node": name,
        "tier": "edge",
        "host": "127.0.0.1",
        "port": 1883,
        "families": (("fashion", "1.0.0"), ("other", "2")),
        "software": "0.1.0",
    }
    return Node(**(values | changes))  # type: ignore[arg-type]


def wait(condition: Callable[[], bool]) -> bool:
    """Port 5353 is shared by everybody: tests wait for their own node, and look at no other."""
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


def named(browser: Browser, name: str) -> list[Node]:
    return [found for found in browser.nodes() if found.node == name]


def test_a_browser_sees_an_advert_come_and_go() -> None:
    """What is announced arrives whole, and a goodbye removes it long before its time to live ends."""
    sent = node(unique())
    changes: list[float] = []
    with Browser(interfaces=LOOPBACK, on_change=lambda: changes.append(time.monotonic())) as browser:
        with Advert(sent, interfaces=LOOPBACK) as told:
            told.check()
            assert wait(lambda: named(browser, sent.node) == [sent])
            seen = len(changes)
            assert seen >= 1
        assert wait(lambda: named(browser, sent.node) == [])
        assert len(changes) > seen


def test_a_late_browser_asks_for_what_was_announced_before() -> None:
    """A device that starts after the server finds it at once."""
    sent = node(unique())
    with Advert(sent, interfaces=LOOPBACK):
        start = time.monotonic()
        with Browser(interfaces=LOOPBACK) as browser:
            assert wait(lambda: named(browser, sent.node) == [sent])
        assert time.monotonic() - start < 2.0


def test_two_servers_with_similar_names_are_two_nodes() -> None:
    """Dots cannot stand in an instance's label; the node's own name survives all the same."""
    name = unique()
    first, second = node(f"{name}.a", port=1), node(f"{name}.b", port=2, tier="cloud")
    with Browser(interfaces=LOOPBACK) as browser, Advert(first), Advert(second):
        assert wait(lambda: named(browser, first.node) + named(browser, second.node) == [first, second])


def test_discovery_works_inside_an_asyncio_loop() -> None:
    """zeroconf would move into the running loop and wait for itself; here it keeps a thread of its own."""
    sent = node(unique())

    async def app() -> bool:
        with Browser(interfaces=LOOPBACK) as browser, Advert(sent, interfaces=LOOPBACK):
            return wait(lambda: named(browser, sent.node) == [sent])

    assert asyncio.run(asyncio.wait_for(app(), 30))


@pytest.mark.parametrize(
    "txt",
    [
        {},
        {"node": "NAME"},
        {"node": "NAME", "tier": "fog"},
        {"node": "no/slash", "tier": "edge"},
        {"node": "NAME", "tier": "edge", "families": "fashion"},
        {"node": "NAME", "tier": "edge", "families": "fashion:1:2"},
        {"node": "NAME", "tier": "edge", "families": ":1"},
        {"node": "NAME", "tier": b"\xff\xfe"},
        {b"\xff": b"x", "node": "NAME", "tier": "edge"},
    ],
)
def test_a_malformed_advert_is_ignored(txt: dict[str | bytes, str | bytes]) -> None:
    """Anybody can announce anything: it is not listed, and the next good advert is."""
    name, good = unique(), node(unique())
    properties = {key: name if value == "NAME" else value for key, value in txt.items()}
    info = zeroconf.ServiceInfo(
        discovery.SERVICE,
        f"{name}.{discovery.SERVICE}",
        port=1883,
        parsed_addresses=["127.0.0.1"],
        properties=properties,
        server=f"{name}.local.",
    )
    stranger = zeroconf.Zeroconf(interfaces=list(LOOPBACK), ip_version=zeroconf.IPVersion.V4Only)
    try:
        with Browser(interfaces=LOOPBACK) as browser:
            stranger.register_service(info, cooperating_responders=True)
            with Advert(good, interfaces=LOOPBACK):
                assert wait(lambda: named(browser, good.node) == [good])
            assert all(found.node not in (name, "no/slash") for found in browser.nodes())
    finally:
        stranger.close()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"node": "two words"}, "two words"),
        ({"node": ""}, "node"),
        ({"tier": "fog"}, "fog"),
        ({"port": 0}, "port 0"),
        ({"port": 70000}, "port 70000"),
        ({"families": (("a b", "1"),)}, "a b"),
    ],
)
def test_a_node_that_cannot_be_told_is_refused(changes: dict[str, object], what: str) -> None:
    """The mistake is named where it is made, not silently lost on the network."""
    with pytest.raises(DiscoveryError, match=what):
        Advert(node(unique(), **changes))


def test_a_broker_known_by_name_is_announced_by_address() -> None:
    """A server that uses a running broker names it as its settings do; adverts hold addresses."""
    sent = node(unique(), host="localhost")
    with Browser(interfaces=LOOPBACK) as browser, Advert(sent):
        assert wait(lambda: [found.host for found in named(browser, sent.node)] == ["127.0.0.1"])
    with (
        Advert(node(unique(), host="no-such-host.invalid"), interfaces=LOOPBACK) as told,
        pytest.raises(DiscoveryError, match="cannot start"),
    ):
        told.check()


def test_an_interface_that_is_not_there_is_named() -> None:
    """Starting goes on without a network, since one may come; check() says what is wrong."""
    with Browser(interfaces=["203.0.113.7"]) as browser:
        assert browser.nodes() == ()
        with pytest.raises(DiscoveryError, match=r"203\.0\.113\.7.*127\.0\.0\.1"):
            browser.check()


def test_closing_twice_and_closing_unstarted_is_harmless() -> None:
    """Constructors start nothing, so there may be nothing to close."""
    Browser().close()
    told = Advert(node(unique()))
    told.start()
    told.close()
    told.close()


def test_a_node_with_many_families_announces_as_many_as_fit() -> None:
    """A TXT string holds 255 bytes; the retained status has the rest."""
    families = tuple((f"family-{number:02}", "1.0.0") for number in range(40))
    txt = advert.write_advert(node("edge", families=families))
    assert len(f"families={txt['families']}") <= 255
    read = advert.read_advert({key.encode(): value.encode() for key, value in txt.items()}, "127.0.0.1", 1)
    assert 10 < len(read.families) < 40
    assert read.families == families[: len(read.families)]


def test_what_strangers_call_their_software_cannot_steer_a_terminal() -> None:
    """Control characters are dropped, long texts cut."""
    txt = {b"node": b"n", b"tier": b"edge", b"software": b"\x1b[2Jevil" + b"x" * 99}
    assert advert.read_advert(txt, "127.0.0.1", 1).software == "[2Jevil" + "x" * 25


def test_loopback_browsers_want_loopback_nodes() -> None:
    """A demo bound to loopback must not find the servers of the real LAN."""
    assert advert.nearest(["192.0.2.1", "127.0.0.1"], ["127.0.0.1"]) == "127.0.0.1"
    with pytest.raises(DiscoveryError, match=r"192\.0\.2\.1"):
        advert.nearest(["192.0.2.1"], ["127.0.0.1"])


def test_every_announced_address_is_one_of_this_machine() -> None:
    """A server on 0.0.0.0 announces what others can reach; loopback only where there is nothing else."""
    addresses = advert.advertised_addresses()
    assert addresses
    assert set(addresses) <= set(advert.local_networks())
    assert addresses == LOOPBACK or not any(address.startswith("127.") for address in addresses)
    assert advert.advertised_addresses(LOOPBACK) == LOOPBACK


FOLLOW = """
import subprocess, sys, time
from kinflow.discovery import Advert, Browser, Node
from kinflow.errors import DiscoveryError

def ip(*words):
    subprocess.run(["ip", *words], check=True)

node = Node("late", "edge", "0.0.0.0", 1883, ())
with Browser() as browser, Advert(node) as told:
    try:
        browser.check()
        sys.exit("there should be no address yet")
    except DiscoveryError:
        pass
    ip("link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    ip("link", "set", "lan0", "up")
    ip("link", "set", "lan1", "up")
    ip("addr", "add", "198.51.100.5/24", "dev", "lan0")
    give_up = time.monotonic() + 20
    while [found.host for found in browser.nodes()] != ["198.51.100.5"]:
        if time.monotonic() > give_up:
            sys.exit(f"not found: {browser.nodes()}")
        time.sleep(0.05)
    browser.check()
    while True:
        try:
            told.check()
            break
        except DiscoveryError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_a_network_that_comes_up_later_is_used() -> None:
    """A board boots faster than its Wi-Fi: browser and advert start without any address and catch up."""
    command = ["unshare", "--net", sys.executable, "-c", FOLLOW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_whoever_announced_first_does_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as many are listed as can be, the newest one takes the place of another."""
    monkeypatch.setattr(discovery, "MAX_NODES", 2)
    with ExitStack() as stack:
        browser = stack.enter_context(Browser(interfaces=LOOPBACK))
        for port in range(1, 6):
            sent = node(unique(), port=port)
            stack.enter_context(Advert(sent, interfaces=LOOPBACK))
            assert wait(lambda sent=sent: named(browser, sent.node) == [sent])
            assert len(browser.nodes()) <= 2
