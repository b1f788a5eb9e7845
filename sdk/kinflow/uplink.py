"""Which server a device asks: found by zeroconf or named in the settings, one link at a time.

A thread of its own makes and replaces the link, so that nothing here ever holds up an inference.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from kinflow import topics
from kinflow.discovery import Browser, Node
from kinflow.errors import KinflowError
from kinflow.family import Family
from kinflow.link import Link
from kinflow.messages import NodeStatus, Tier
from kinflow.mqtt import BrokerAddress
from kinflow.policy import LinkEstimate, NoRoute, Route

log = logging.getLogger("kinflow.uplink")

CHECK_INTERVAL_S = 0.25
# A server that stays unreachable this long is given up for another one that is announced.
GIVE_UP_S = 2.0
# Before the first reply nothing is known of the link: expect little, the deadline still holds.
FIRST_ROUND_TRIP_S = 0.005


class Uplink:
    """Keeps a Link to a server that can continue `family` at `split` with `codec`."""

    def __init__(
        self,
        family: Family,
        split: str,
        codec: str,
        client_id: str,
        *,
        tiers: Sequence[Tier],
        broker: str = "",
        interfaces: Sequence[str] = (),
    ) -> None:
        """`tiers`: those that may be asked, the preferred one first."""
        self._tiers = tuple(tiers)
        self._family = family
        self._split = split
        self._codec = codec
        self._client_id = client_id
        self._fixed = BrokerAddress.parse(broker) if broker else None
        self._browser = None if broker else Browser(interfaces=interfaces, on_change=self._poke)
        self._link: Link | None = None
        self._address: BrokerAddress | None = None
        self._lost_since: float | None = None
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._routable = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kinflow-uplink", daemon=True)

    def start(self) -> None:
        if self._browser is not None:
            self._browser.start()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._changed.set()
        self._thread.join()
        if self._browser is not None:
            self._browser.close()
        if self._link is not None:
            self._link.close()

    @property
    def link(self) -> Link | None:
        return self._link

    def wait(self, timeout_s: float) -> bool:
        """True as soon as there is a route, False when there is none after `timeout_s`."""
        with self._routable:
            return self._routable.wait_for(lambda: isinstance(self.route(), Route), timeout_s)

    def route(self) -> Route | NoRoute:
        """The best server of the connected broker, or why there is none."""
        link = self._link
        if link is None:
            return NoRoute("no server found yet")
        if not link.connected:
            return NoRoute(f"no connection to {self._address}")
        refusal = "no server on the broker"
        best: NodeStatus | None = None
        for status in list(link.nodes.values()):
            why = self._refusal(status)
            if why:
                refusal = why
            elif best is None or self._rank(status) < self._rank(best):
                best = status
        if best is None:
            return NoRoute(refusal)
        round_trip = link.round_trip_s
        estimate = LinkEstimate(FIRST_ROUND_TRIP_S if round_trip is None else round_trip, best.queue_ms / 1e3)
        return Route(best.node, best.tier, self._split, self._codec, estimate)

    def topic(self, route: Route) -> str:
        """Where requests to the route's tier go."""
        return topics.request(route.tier, self._family.id, route.split)

    def _rank(self, status: NodeStatus) -> tuple[int, float, str]:
        return self._tiers.index(status.tier), status.queue_ms, status.node

    def _refusal(self, status: NodeStatus) -> str:
        """Why this node cannot be asked; empty when it can."""
        if status.tier not in self._tiers:
            return f"{status.node} is an {status.tier} server, {' or '.join(self._tiers)} is asked"
        if status.state != "ready":
            return f"{status.node} is {status.state}"
        for served in status.families:
            if served.family == self._family.id:
                if served.version != self._family.version:
                    return f"{status.node} serves {served.family} {served.version}, this is {self._family.version}"
                if self._codec not in served.splits.get(self._split, []):
                    return f"{status.node} does not take {self._codec} at split {self._split}"
                return ""
        return f"{status.node} does not serve {self._family.id}"

    def _poke(self, _status: NodeStatus | None = None) -> None:
        self._changed.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._supervise(time.monotonic())
            except KinflowError as exc:
                log.warning("uplink error=%s", exc)
            with self._routable:
                self._routable.notify_all()
            self._changed.wait(CHECK_INTERVAL_S)
            self._changed.clear()

    def _supervise(self, now_s: float) -> None:
        """Make the first link, and replace one that stays unusable when another server is announced."""
        if self._link is not None and isinstance(self.route(), Route):
            self._lost_since = None
            return
        if self._lost_since is None:
            self._lost_since = now_s
        if self._link is not None and now_s - self._lost_since < GIVE_UP_S:
            return
        target = self._next_address()
        if target is None or (self._link is not None and target == self._address):
            return
        old, self._link = self._link, None
        if old is not None:
            old.close()
        link = Link(target, self._client_id, on_status=self._poke)
        link.start()
        self._address, self._link, self._lost_since = target, link, now_s
        log.info("uplink broker=%s", target)

    def _next_address(self) -> BrokerAddress | None:
        """The named broker, or the announced server after the one in use: edge first, then by name."""
        if self._browser is None:
            return self._fixed
        announced = [
            BrokerAddress(node.host, node.port)
            for node in sorted(self._browser.nodes(), key=_announcement_rank)
            if (self._family.id, self._family.version) in node.families
        ]
        if not announced:
            return None
        if self._address in announced:
            return announced[(announced.index(self._address) + 1) % len(announced)]
        return announced[0]


def _announcement_rank(node: Node) -> tuple[bool, str]:
    return node.tier != "edge", node.node
