"""Recent requests: a repeat is known, its reply is there, and memory is bounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from kinflow_edge.recent import RecentRequests


def test_a_repeat_gets_the_first_ones_reply() -> None:
    """New, then being computed, then answered from memory as often as asked."""
    recent = RecentRequests()
    assert recent.begin("device", b"a") == (True, None)
    assert recent.begin("device", b"a") == (False, None)
    recent.finish("device", b"a", b"reply")
    assert recent.begin("device", b"a") == (False, b"reply")
    assert recent.begin("device", b"a") == (False, b"reply")
    assert recent.begin("device", b"b") == (True, None)


def test_a_refused_request_may_be_tried_again() -> None:
    """Forgotten, it is new; forgetting what is not there is harmless."""
    recent = RecentRequests()
    recent.begin("device", b"a")
    recent.forget("device", b"a")
    recent.forget("device", b"never seen")
    assert recent.begin("device", b"a") == (True, None)


def test_another_clients_request_is_another_request() -> None:
    """The same id from somebody else gets nothing that was computed for the first."""
    recent = RecentRequests()
    recent.begin("device", b"a")
    recent.finish("device", b"a", b"reply")
    assert recent.begin("stranger", b"a") == (True, None)


def test_the_oldest_goes_first() -> None:
    """Beyond the capacity the oldest is forgotten, and a reply that comes late for it is not kept."""
    recent = RecentRequests(capacity=2)
    for request_id in (b"a", b"b", b"c"):
        recent.begin("device", request_id)
    recent.finish("device", b"a", b"late")
    recent.finish("device", b"c", b"reply")
    assert recent.begin("device", b"c") == (False, b"reply")
    assert recent.begin("device", b"b") == (False, None)
    assert recent.begin("device", b"a") == (True, None)
    assert recent.begin("device", b"b") == (True, None)


def test_only_one_of_many_threads_is_the_first() -> None:
    """Repeats that arrive at the same time are computed once."""
    recent = RecentRequests()
    ids = [bytes([n]) * 16 for n in range(50)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda id_: recent.begin("device", id_), ids * 8))
    assert sum(new for new, _ in results) == len(ids)
