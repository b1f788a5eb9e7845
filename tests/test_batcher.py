"""The batcher: everything put in comes out once and in order, and the queue says how long it is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kinflow_edge.batcher import SMOOTHING, Batcher


def batcher(size: int = 4, wait_s: float = 0.0, capacity: int = 100) -> Batcher[int]:
    return Batcher(size=size, wait_s=wait_s, capacity=capacity, per_client=capacity)


def test_batches_are_what_has_come_up_to_the_size() -> None:
    """In order, without waiting for more."""
    queue = batcher(size=4)
    for item in range(6):
        assert queue.put("device", item)
    assert queue.take() == [0, 1, 2, 3]
    assert queue.take() == [4, 5]


def test_a_full_queue_refuses() -> None:
    """Above the capacity put says False, and takes again once there is room."""
    queue = batcher(size=1, capacity=2)
    assert [queue.put("device", item) for item in range(3)] == [True, True, False]
    assert queue.take() == [0]
    assert queue.put("device", 3)
    assert not queue.put("device", 4)


def test_take_waits_for_the_first_item() -> None:
    """An empty queue blocks until something comes."""
    queue = batcher()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(queue.take)
        time.sleep(0.05)
        assert not taken.done()
        queue.put("device", 7)
        assert taken.result(5) == [7]


def test_a_wait_lets_a_batch_fill() -> None:
    """What comes within the wait joins the batch; a full batch leaves at once."""
    queue = batcher(size=3, wait_s=5.0)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(queue.take)
        for item in range(3):
            time.sleep(0.02)
            assert not taken.done()
            queue.put("device", item)
        assert taken.result(2) == [0, 1, 2]


def test_a_wait_ends() -> None:
    """A batch that does not fill leaves when its wait is over, not before."""
    queue = batcher(size=3, wait_s=0.1)
    queue.put("device", 0)
    start = time.monotonic()
    assert queue.take() == [0]
    assert 0.09 <= time.monotonic() - start < 2.0


def test_closing_ends_waits_and_leaves_what_is_queued() -> None:
    """After close nothing enters, what waits comes out, and then take says so with an empty batch."""
    queue = batcher(size=2, wait_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        queue.put("device", 0)
        taken = pool.submit(queue.take)
        time.sleep(0.05)
        queue.close()
        assert taken.result(5) == [0]
    assert not queue.put("device", 1)
    assert queue.take() == []

    queue = batcher(size=2)
    for item in range(3):
        queue.put("device", item)
    queue.close()
    assert [queue.take() for _ in range(3)] == [[0, 1], [2], []]


def test_closing_wakes_an_empty_take() -> None:
    """A worker that waits for the first item ends."""
    queue = batcher()
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(queue.take)
        time.sleep(0.02)
        queue.close()
        assert taken.result(5) == []


@pytest.mark.parametrize("wait_s", [0.0, 0.001])
def test_nothing_is_lost_or_doubled_under_load(wait_s: float) -> None:
    """Many threads put, one takes: each item comes out once, each thread's in its order."""
    queue = batcher(size=7, wait_s=wait_s, capacity=50)
    came: list[int] = []

    def put(first: int) -> None:
        for item in range(first, first + 500):
            while not queue.put("device", item):
                time.sleep(0.0005)

    def take() -> None:
        while batch := queue.take():
            assert len(batch) <= 7
            came.extend(batch)

    taker = threading.Thread(target=take)
    taker.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(0, 2000, 500)))
    queue.close()
    taker.join(10)
    assert not taker.is_alive()
    assert sorted(came) == list(range(2000))
    for first in range(0, 2000, 500):
        mine = [item for item in came if first <= item < first + 500]
        assert mine == sorted(mine)


def test_the_queue_delay_is_learned_from_what_batches_cost() -> None:
    """The first batch sets the cost of an item, later ones are smoothed in; what waits is multiplied with it."""
    queue = batcher(size=4)
    assert queue.queue_s("device") == 0.0
    queue.done(4, 0.4)
    assert queue.queue_s("device") == pytest.approx(0.1)
    queue.done(2, 0.6)
    per_item_s = (1 - SMOOTHING) * 0.1 + SMOOTHING * 0.3
    assert queue.queue_s("device") == pytest.approx(per_item_s)
    for item in range(3):
        queue.put("device", item)
    assert queue.queue_s("device") == pytest.approx(4 * per_item_s)


def test_a_batch_being_computed_counts() -> None:
    """First for what it still needs; once it is overdue, the longer the more."""
    queue = batcher(size=4)
    queue.done(1, 0.1)
    for item in range(4):
        queue.put("device", item)
    queue.take()
    assert 0.3 < queue.queue_s("device") <= 0.5
    queue.done(4, 0.4)
    assert queue.queue_s("device") == pytest.approx(0.1)

    queue = batcher()
    queue.done(1, 0.001)
    queue.put("device", 0)
    queue.take()
    time.sleep(0.1)
    early_s = queue.queue_s("device")
    time.sleep(0.1)
    assert queue.queue_s("device") > early_s + 0.05
