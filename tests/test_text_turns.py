"""Who is computed next, and which sessions are held: pure, with jobs that nothing computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinflow.errors import SessionLimit
from kinflow.text.family import TextFamily
from kinflow_edge.text.job import Job
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.store import Bounds, Sessions
from kinflow_edge.text.turns import SHORT, Turns
from text_client import Writer


@pytest.fixture(scope="module")
def model(tiny: Path) -> ServedText:
    return ServedText.open(TextFamily.load(tiny), "cloud", 1)


def job(model: ServedText, client: str, positions: int) -> Job:
    writer = Writer(model.family, client, ask=lambda *_: pytest.fail("nobody is asked"))
    writer._add([5] * positions)
    verify, payload = writer.request(0, positions)
    tokens, features = model.read(verify, payload)
    return Job(verify, model, model.way("s1", "cloud"), tokens, features, 0.0, 0.0, 1e9, False, positions)


def test_short_ones_go_together_and_long_ones_between(model: ServedText) -> None:
    """A chunk after each batch, as long as there are both: neither waits for all of the other."""
    turns = Turns(size=2, chunk=64)
    short = [job(model, f"s{number}", 3) for number in range(5)]
    long = job(model, "long", SHORT + 1)
    for each in (*short[:2], long, *short[2:]):
        turns.put(each)
    order = []
    while len(turns):
        batch = turns.next()
        order.append([each.verify.client for each in batch])
        if batch == [long]:
            turns.put(long)
        if len(order) == 5:
            turns.remove("long", lambda other: other is long)
    assert order[:5] == [["s0", "s1"], ["long"], ["s2", "s3"], ["long"], ["s4"]]
    assert turns.next() == []


def test_clients_take_turns(model: ServedText) -> None:
    """Who sends much waits for the others, in batches and in chunks."""
    turns = Turns(size=2, chunk=64)
    for positions in (3, SHORT + 1):
        for client in ("a", "a", "a", "b"):
            turns.put(job(model, client, positions))
    order = [[each.verify.client for each in turns.next()] for _ in range(4)]
    assert order == [["a", "b"], ["a"], ["a", "a"], ["b"]]


def test_the_wait_grows_with_what_is_there(model: ServedText) -> None:
    """A short one waits for a batch and a chunk, a long one for all chunks of its own and the others' between them."""
    turns = Turns(size=2, chunk=64)
    assert turns.wait_s(4) == 0
    turns.took(4, 0.01)
    turns.took(64, 0.1)
    assert turns.wait_s(4) == pytest.approx(0.01)
    assert turns.wait_s(128) == pytest.approx(0.2)
    turns.put(job(model, "a", SHORT + 1))
    turns.put(job(model, "a", 2))
    assert turns.wait_s(4) == pytest.approx(0.11)
    assert turns.wait_s(128) == pytest.approx(2 * (0.2 + 0.01))


def test_the_least_used_session_makes_room(model: ServedText) -> None:
    """Not one that was used lately, nor one that is computed for; without any the new one is refused."""
    held = Sessions(Bounds(sessions=3, per_client=2, cache_bytes=1 << 30, idle_s=100.0, keep_s=10.0))
    first, _ = held.open(model, "a", b"1", 0.0)
    held.open(model, "a", b"2", 1.0)
    held.open(model, "b", b"3", 2.0)
    with pytest.raises(SessionLimit, match="2 sessions of one client"):
        held.open(model, "a", b"4", 5.0)
    held.get("tiny", "a", b"1", 15.0)
    _, gone = held.open(model, "a", b"4", 20.0)
    assert [session.id for session in gone] == [b"2"]
    first.job = job(model, "a", 2)
    _, gone = held.open(model, "c", b"5", 26.0)
    assert [session.id for session in gone] == [b"3"]
    assert (len(held), held.evicted) == (3, 2)
    assert [session.id for session in held.expire(200.0)] == [b"4", b"5"]
    assert held.get("tiny", "b", b"1", 201.0) is None
    assert held.get("tiny", "a", b"1", 201.0) is first
