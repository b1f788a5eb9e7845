"""What a worker does with every request: here, that nobody may send too many."""

from __future__ import annotations

import os

import pytest

from kinflow import topics
from kinflow.frame import pack, unpack
from kinflow.messages import Busy, Probe, Request
from kinflow_edge.desk import Desk

PER_S = 5


def request(client: str) -> Request:
    return Request(os.urandom(16), client, "fashion", "1.0.0", "s1", "s1-q4", 250.0)


@pytest.fixture
def sent() -> list[tuple[str, bytes]]:
    return []


@pytest.fixture
def desk(sent: list[tuple[str, bytes]]) -> Desk:
    return Desk("node-1", lambda topic, data: sent.append((topic, data)), PER_S, "edge-test")


def read(desk: Desk, message: Request | Probe) -> bool:
    topic = topics.request("edge", "fashion", "s1", message.client)
    return desk.read(topic, pack(message, b""), (Request, Probe)) is not None


def test_a_client_that_asks_too_much_is_told_busy(desk: Desk, sent: list[tuple[str, bytes]]) -> None:
    """With the time after which it may; what it asked more is counted, and other clients are served."""
    assert all(read(desk, request("noisy")) for _ in range(PER_S))
    refused = request("noisy")
    assert not read(desk, refused)
    ((topic, data),) = sent
    busy = unpack(data).message
    assert topic == topics.reply("noisy")
    assert isinstance(busy, Busy)
    assert busy.id == refused.id
    assert 0 < busy.queue_ms <= 1e3 / PER_S
    assert (desk.counts["limited"], desk.rejected) == (1, 1)
    assert read(desk, request("quiet"))


def test_what_needs_no_answer_is_dropped(desk: Desk, sent: list[tuple[str, bytes]]) -> None:
    """A flood of probes is not answered by a flood."""
    assert sum(read(desk, Probe(os.urandom(16), "noisy")) for _ in range(100)) == PER_S
    assert sent == []
    assert desk.counts["limited"] == 100 - PER_S


def test_the_server_s_own_test_is_not_limited(desk: Desk) -> None:
    """A crowd of devices must not make the server look unwell."""
    assert all(read(desk, request("edge-test")) for _ in range(3 * PER_S))
