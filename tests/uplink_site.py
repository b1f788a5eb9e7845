"""What tests of the uplink have in common: servers as a device sees them, and what an uplink says of them."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from brokers import TestBroker
from kinflow import topics
from kinflow.address import parse_all
from kinflow.family import Family
from kinflow.frame import pack
from kinflow.messages import NodeStatus, Served, Tier
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.policy import NoRoute, Rate, Route
from kinflow.uplink import Uplink

LOOPBACK = "127.0.0.1"
NOWHERE = BrokerAddress(LOOPBACK, 9)
RATES = (Rate("q8", 800.0), Rate("q4", 300.0))


class FakeNode:
    """What a server looks like from a device: a retained status, which can be changed."""

    def __init__(self, address: BrokerAddress, family: Family, node: str, tier: Tier = "edge") -> None:
        served = Served(family.id, family.version, {"s1": ["q8", "q4"]})
        self.status = NodeStatus(node, tier, "ready", families=[served])
        self.connection = Connection(address, f"{tier}-{os.urandom(4).hex()}", on_message=lambda _topic, _data: None)

    def __enter__(self) -> FakeNode:
        self.connection.start()
        assert self.connection.wait_connected(10)
        self.say()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def say(self, **changes: Any) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)
        self.connection.publish(topics.status(self.status.node), pack(self.status), retain=True)


def make(family: Family, broker: str, *, tiers: tuple[Tier, ...] = ("edge", "cloud")) -> Uplink:
    return Uplink(
        family,
        f"device-{os.urandom(4).hex()}",
        tiers=tiers,
        brokers=parse_all(broker),
        browse=not broker,
        interfaces=[LOOPBACK],
    )


def order(uplink: Uplink) -> list[str]:
    """The nodes in the order of resort, or why there is none."""
    routes = uplink.routes("s1", RATES)
    return [routes.reason] if isinstance(routes, NoRoute) else [route.node for route in routes]


def chosen(uplink: Uplink) -> str:
    return order(uplink)[0]


def best(uplink: Uplink) -> Route:
    routes = uplink.routes("s1", RATES)
    assert not isinstance(routes, NoRoute)
    return routes[0]


def found(uplink: Uplink, timeout_s: float = 10) -> bool:
    return uplink.wait("s1", RATES, timeout_s)


def connected(uplink: Uplink, broker: TestBroker) -> bool:
    """Before any server has said anything there."""
    return chosen(uplink) == f"no server at {broker.address}"
