"""The fair queue: each client in turn, nobody starves, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinflow_edge.fair import FairQueue


def test_clients_take_turns() -> None:
    """A noisy one fills the queue, a quiet one comes later and is second in line."""
    queue: FairQueue[str] = FairQueue(capacity=10, per_client=10)
    for number in range(5):
        assert queue.put("noisy", f"n{number}")
    assert queue.ahead("quiet") == 1
    assert queue.ahead("noisy") == 5
    assert queue.put("quiet", "q0")
    assert queue.ahead("noisy") == 6
    assert [queue.take() for _ in range(6)] == ["n0", "q0", "n1", "n2", "n3", "n4"]
    with pytest.raises(IndexError):
        queue.take()


def test_limits_hold_for_all_and_for_each() -> None:
    """One that is at its limit is refused while others still get in."""
    queue: FairQueue[int] = FairQueue(capacity=3, per_client=2)
    assert [queue.put("a", number) for number in range(3)] == [True, True, False]
    assert queue.put("b", 3)
    assert not queue.put("c", 4)
    assert len(queue) == 3


def test_what_is_taken_back_is_gone() -> None:
    """Only the client's own item, only while it waits; its place in line goes with the last one."""
    queue: FairQueue[int] = FairQueue(capacity=9, per_client=9)
    for item in (1, 2):
        queue.put("a", item)
    queue.put("b", 3)
    assert not queue.remove("b", lambda item: item == 1)
    assert queue.remove("a", lambda item: item == 1)
    assert not queue.remove("a", lambda item: item == 1)
    assert queue.remove("b", lambda item: item == 3)
    assert (len(queue), queue.take(), len(queue)) == (1, 2, 0)
    assert queue.ahead("b") == 0


@given(st.lists(st.one_of(st.none(), st.sampled_from("abcd")), max_size=200))
def test_every_item_comes_out_once_in_its_clients_order_and_when_it_was_foretold(steps: list[str | None]) -> None:
    """`ahead` says how many come first unless others come meanwhile; per client it is first in, first out."""
    queue: FairQueue[tuple[str, int]] = FairQueue(capacity=1000, per_client=1000)
    put: dict[str, list[int]] = {}
    taken: dict[str, list[int]] = {}
    for number, client in enumerate(steps):
        if client is not None:
            assert queue.put(client, (client, number))
            put.setdefault(client, []).append(number)
        elif len(queue):
            name, item = queue.take()
            taken.setdefault(name, []).append(item)
    ahead = queue.ahead("last")
    queue.put("last", ("last", -1))
    for position in range(len(queue)):
        name, item = queue.take()
        if name == "last":
            assert position == ahead
        taken.setdefault(name, []).append(item)
    assert taken == {**put, "last": [-1]}
