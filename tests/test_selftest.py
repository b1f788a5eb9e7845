"""When a server counts as ready: whose test inference is sent, and what its outcome says."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from kinflow.errors import LinkTimeout
from kinflow.frame import Buffer
from kinflow.messages import Request
from kinflow.mqtt import BrokerAddress
from kinflow_edge.selftest import INTERVAL_S, SelfTest


class Served:
    """What the test needs of a served family."""

    def __init__(self, family: str) -> None:
        self._family = family

    def test_request(self) -> tuple[Request, bytes]:
        return Request(bytes(16), "test", self._family, "1", "s1", "raw", 1.0), b""


def test_a_family_that_fails_is_not_hidden_by_one_that_does_not() -> None:
    """Of two families one gets no answer: within two tests of it the server is in trouble, and out of it after one."""
    broken = {"bad"}

    def request(_topic: str, asked: Request, _payload: Buffer) -> Future[Any]:
        ended: Future[Any] = Future()
        if asked.family in broken:
            ended.set_exception(LinkTimeout(f"{asked.family} was silent"))
        else:
            ended.set_result(None)
        return ended

    models: Any = {"good": Served("good"), "bad": Served("bad")}
    test = SelfTest("edge-a", models, BrokerAddress("127.0.0.1", 9), "test")
    test._link.request = request  # type: ignore[method-assign, assignment]
    test._at_s = 1.0  # it has started
    now_s = 1.0
    while not test.trouble:
        test.step(now_s)
        now_s += 0.25
        assert now_s < 3 * INTERVAL_S
    assert "bad was silent" in test.trouble
    broken.clear()
    for _ in range(4):
        test.step(now_s)
        now_s += 0.25
    assert test.trouble == ""
