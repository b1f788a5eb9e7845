"""One server as its client sees it: what makes a node that was left alone worth a try again."""

from __future__ import annotations

import time
from concurrent.futures import Future

from kinflow.awaited import Echoed
from kinflow.breaker import TRIP_AFTER, Breaker
from kinflow.errors import LinkTimeout
from kinflow.link import Link
from kinflow.messages import NodeStatus
from kinflow.mqtt import BrokerAddress
from kinflow.peer import SILENT_S, Peer

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
    probe: Future[Echoed] = Future()
    probe.set_exception(LinkTimeout("nothing came"))
    peer._learn_from_probe(probe)
    assert peer.breaker.state(time.monotonic()) == "open"
    peer.said(READY)
    assert peer.breaker.state(time.monotonic()) == "half-open"


def test_a_status_as_before_is_no_comeback() -> None:
    """A node that goes on saying that it is ready, and does not answer, is left alone as long as was found."""
    peer = left_alone()
    peer.said(READY)
    assert peer.breaker.state(time.monotonic()) == "open"
