"""One server as its client sees it: what makes a node that was left alone worth a try again."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest

from kinflow.awaited import Answered, Echoed
from kinflow.breaker import TRIP_AFTER, Breaker
from kinflow.errors import LinkError, LinkTimeout, RequestCancelled
from kinflow.link import Link
from kinflow.messages import Echo, NodeStatus, Reply
from kinflow.mqtt import BrokerAddress
from kinflow.peer import CLEARING_ECHOES, DOUBT_INTERVAL_S, PROBE_TIMEOUT_S, SILENT_S, Peer
from kinflow.uplink import CHECK_INTERVAL_S

READY = NodeStatus("edge-a", "edge", "ready")


def left_alone() -> Peer:
    """A node that said it was ready, and then failed so often that it is not to be tried for a while."""
    peer = Peer("edge-a", Link(BrokerAddress("127.0.0.1", 9), "cam-1"))
    peer.said(READY)
    peer.breaker = Breaker(TRIP_AFTER + 3, time.monotonic() + 60)
    return peer


def test_a_status_on_a_new_connection_is_a_comeback() -> None:
    """The link was silent and is made anew: the same status as before, heard there, makes the node worth a try."""
    peer = left_alone()
    peer.link.heard_s -= 2 * SILENT_S
    unanswered(peer)
    assert peer.breaker.state(time.monotonic()) == "open"
    peer.said(READY)
    assert peer.breaker.state(time.monotonic()) == "half-open"


def test_a_status_as_before_is_no_comeback() -> None:
    """A node that goes on saying that it is ready, and does not answer, is left alone as long as was found."""
    peer = left_alone()
    peer.said(READY)
    assert peer.breaker.state(time.monotonic()) == "open"


def unanswered(peer: Peer) -> None:
    probe: Future[Echoed] = Future()
    probe.set_exception(LinkTimeout("nothing came"))
    peer._learn_from_probe(probe)


def echo(peer: Peer, size_bytes: int = 150) -> None:
    probe: Future[Echoed] = Future()
    probe.set_result(Echoed(Echo(bytes(16), "edge-a", 0.0), size_bytes, 0.002))
    peer._learn_from_probe(probe)


def probed(peer: Peer, after_s: float) -> bool:
    """Whether it is, so long after it was heard of, by a client that probes idle nodes every 5 s."""
    before = peer._probes
    peer.link.heard_s = time.monotonic() + after_s
    peer.probe_if_due("topic", time.monotonic() + after_s, 5.0)
    return peer._probes > before


def test_a_node_that_failed_once_is_as_good_as_new_after_a_few_echoes() -> None:
    """Two silences do not open the breaker, yet the node looks slow, is not asked, and could not show better."""
    peer = Peer("edge-a", Link(BrokerAddress("127.0.0.1", 9), "cam-1"))
    echo(peer)
    fresh_s = peer.estimate.cost_s(1000)
    for _ in range(2):
        unanswered(peer)
    assert peer.estimate.cost_s(1000) > 10 * fresh_s
    for _ in range(CLEARING_ECHOES):
        assert probed(peer, DOUBT_INTERVAL_S + 0.1)
        echo(peer)
    assert peer.estimate.cost_s(1000) == fresh_s
    assert not probed(peer, DOUBT_INTERVAL_S + 0.1)
    assert CLEARING_ECHOES * (DOUBT_INTERVAL_S + CHECK_INTERVAL_S) + PROBE_TIMEOUT_S < 5


def test_a_silent_link_is_probed_and_made_anew_by_the_first_probe_that_is_not_answered() -> None:
    """A node that nobody asks: its half-open connection is found by its statuses staying out."""
    renewed = []
    peer = Peer("edge-a", Link(BrokerAddress("127.0.0.1", 9), "cam-1"))
    peer.link.connection.renew = lambda: renewed.append(True)  # type: ignore[method-assign]
    echo(peer)
    assert not probed(peer, DOUBT_INTERVAL_S + 0.1)
    peer.link.heard_s = time.monotonic()
    unanswered(peer)
    assert not renewed  # others speak on this link
    peer.link.heard_s -= SILENT_S + 0.1
    peer._heard_s -= DOUBT_INTERVAL_S
    before = peer._probes
    peer.probe_if_due("topic", time.monotonic(), 5.0)
    assert peer._probes > before
    unanswered(peer)
    assert renewed


@pytest.mark.parametrize(("error", "state"), [(RequestCancelled("x"), "closed"), (LinkTimeout("x"), "open")])
def test_only_what_was_waited_for_to_the_end_has_failed(error: LinkError, state: str) -> None:
    """That another node answered first says that this one is slow, not that it is mute: probes find that out."""
    peer = Peer("edge-a", Link(BrokerAddress("127.0.0.1", 9), "cam-1"))
    echo(peer)
    before_s = peer.estimate.cost_s(1000)
    for _ in range(TRIP_AFTER):
        ended: Future[Answered[Reply]] = Future()
        ended.set_exception(error)
        peer._learn(time.monotonic() - 0.4, 1000, 0.1, ended)
    assert peer.breaker.state(time.monotonic()) == state
    assert peer.estimate.cost_s(1000) > before_s + 0.1
    assert state == "open" or probed(peer, DOUBT_INTERVAL_S + 0.1)
