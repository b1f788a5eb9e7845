"""Real brokers for tests: the product's own child processes, which can be frozen, killed and brought back."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import which

from kinflow.mqtt import BrokerAddress
from kinflow.settings import BrokerSettings
from kinflow_edge.broker import EXTRA_PATH, Broker

KINDS = [
    kind
    for kind, there in (
        ("mosquitto", which("mosquitto") or which("mosquitto", path=EXTRA_PATH)),
        ("embedded", find_spec("iotcore")),
    )
    if there
]


class TestBroker:
    """One running broker on a free port of 127.0.0.1."""

    __test__ = False

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.kind = broker.kind

    @property
    def address(self) -> BrokerAddress:
        return self._broker.address

    def kill(self) -> None:
        """As a power cut would: no DISCONNECT, no will handed on."""
        self._signal(signal.SIGKILL)
        wait_until(lambda: not self._accepts())

    def bring_back(self) -> None:
        """On the same port."""
        wait_until(self._broker.restart_if_dead)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connected, but neither reading nor answering."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._broker.pid is not None
        os.kill(self._broker.pid, number)

    def _accepts(self) -> bool:
        try:
            with socket.create_connection((self.address.host, self.address.port), timeout=1):
                return True
        except OSError:
            return False


@contextmanager
def running(kind: str) -> Iterator[TestBroker]:
    with Broker(BrokerSettings(kind=kind, port=0)) as broker:
        yield TestBroker(broker)


def wait_until(condition, timeout_s: float = 15.0) -> None:
    """Poll `condition`, and fail when it stays false."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {timeout_s} s"
        time.sleep(0.005)
