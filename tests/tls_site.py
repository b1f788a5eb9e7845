"""What tests of TLS have in common: clients with certificates, and a mosquitto with a false one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brokers import wait_until
from kinflow import children, topics
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.tls import Credentials
from kinflow_edge import broker as broker_module
from kinflow_edge.broker import Broker

CAM, OTHER = "device.cam-1", "device.cam-2"
EDGE = "edge.kitchen"
REQUEST = topics.request("edge", "fam", "s1", CAM)
REQUESTS = topics.requests("edge", "fam", "s1", "")
# What is refused is dropped in silence: a message sent after it shows that it is not still on its way.
MARK = b"mark"


class Client:
    """A connection that keeps what comes."""

    def __init__(self, broker: Broker, tls: Credentials | None, *subscriptions: str, name: str = "") -> None:
        self.came: list[tuple[str, bytes]] = []
        self.connection = Connection(
            broker.address,
            name or f"client-{os.urandom(6).hex()}",
            on_message=lambda topic, data: self.came.append((topic, bytes(data))),
            subscriptions=subscriptions,
            tls=tls,
        )

    def __enter__(self) -> Client:
        self.connection.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def connected(self) -> Client:
        assert self.connection.wait_connected(10)
        return self

    def payloads(self, until: bytes = MARK) -> list[bytes]:
        """What came before `until` did."""
        wait_until(lambda: any(data == until for _, data in self.came))
        return [data for _, data in self.came if data != until]


@contextmanager
def mosquitto_with(folder: Path, work: Path) -> Iterator[BrokerAddress]:
    """A mosquitto that presents whatever certificate lies in `folder`, and asks for none."""
    port = broker_module._free_port("127.0.0.1")
    place = work / "impostor"
    place.mkdir()
    for name in ("ca.pem", "cert.pem", "key.pem"):
        shutil.copy(folder / name, place / name)
    (place / "conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\ncafile ca.pem\ncertfile cert.pem\nkeyfile key.pem\n"
    )
    account = broker_module._account("mosquitto")
    if account:
        for path in (place, *place.iterdir()):
            os.chown(path, account["user"], account["group"])
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=broker_module.EXTRA_PATH)
    process = children.spawn([str(program), "-c", "conf"], cwd=place, **account)
    address = BrokerAddress("127.0.0.1", port)
    try:
        wait_until(lambda: broker_module._accepts(address))
        yield address
    finally:
        children.stop(process)
