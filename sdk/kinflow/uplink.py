"""Which server is asked: found by zeroconf or named in the settings, one link at a time.

Devices use it for the edge, edge servers for the cloud. A thread of its own makes and replaces the link,
so that nothing here ever holds up an inference. A link is replaced when its server stays unusable and another
one is announced, or when one of a nearer tier is announced; the new link must work before the old one is left.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kinflow import topics
from kinflow.discovery import Browser
from kinflow.errors import KinflowError, LinkLost
from kinflow.family import Family
from kinflow.frame import Buffer
from kinflow.link import Answered, Link
from kinflow.logs import event
from kinflow.messages import NodeStatus, Request, Tier
from kinflow.mqtt import BrokerAddress
from kinflow.policy import LinkEstimate, NoRoute, Route

log = logging.getLogger("kinflow.uplink")

CHECK_INTERVAL_S = 0.25
# A server that stays unusable this long is given up for another one that is announced ...
GIVE_UP_S = 2.0
# ... and not tried again for this long while there are others.
AVOID_S = 5.0
# What a new link gets to connect and hear of a usable server before it is dropped again.
TRIAL_S = 1.5
# A replaced link stays open this long: requests may still be under way on it.
RETIRE_S = 10.0
# At the start a farther tier is taken only when no nearer one was announced in this time.
PATIENCE_S = 0.5
# Before the first reply nothing is known of the way: expect little, the deadline still holds.
FIRST_ROUND_TRIP_S = 0.005


@dataclass(frozen=True)
class _Target:
    """A broker to link to; a named one stands for every tier."""

    address: BrokerAddress
    rank: int
    """Place of its tier among those asked, 0 the nearest."""


@dataclass(frozen=True)
class _Path:
    """The link in use and where it leads."""

    target: _Target
    link: Link


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
        self._fixed = _Target(BrokerAddress.parse(broker), 0) if broker else None
        self._browser = None if broker else Browser(interfaces=interfaces, on_change=self._poke)
        self._path: _Path | None = None
        self._retired: list[tuple[float, Link]] = []
        self._avoided_until_s: dict[BrokerAddress, float] = {}
        self._unusable_since_s = 0.0
        self._started_s = 0.0
        self._links_made = 0
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._routable = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kinflow-uplink", daemon=True)

    def start(self) -> None:
        if self._browser is not None:
            self._browser.start()
        self._started_s = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._changed.set()
        self._thread.join()
        if self._browser is not None:
            self._browser.close()
        links = [link for _, link in self._retired]
        if self._path is not None:
            links.append(self._path.link)
        for link in links:
            link.close()

    def wait(self, timeout_s: float) -> bool:
        """True as soon as there is a route, False when there is none after `timeout_s`."""
        with self._routable:
            return self._routable.wait_for(lambda: isinstance(self.route(), Route), timeout_s)

    def route(self) -> Route | NoRoute:
        """The best server that the current link reaches, or why there is none."""
        path = self._path
        return NoRoute("no server found yet") if path is None else self._route_by(path)

    def request(self, route: Route, request_id: bytes, payload: Buffer, remaining_s: float) -> Future[Answered]:
        """Send coded features along `route`. The future ends within `remaining_s`, see Link.request.

        Raises LinkLost when the link that `route` was for was replaced meanwhile.
        """
        path = self._path
        if path is None or route.node not in path.link.nodes:
            raise LinkLost(f"the link to {route.node} was just replaced")
        request = Request(
            id=request_id,
            client=path.link.client_id,
            family=self._family.id,
            version=self._family.version,
            split=route.split,
            codec=route.codec,
            deadline_ms=max(0.0, remaining_s) * 1e3,
        )
        return path.link.request(topics.request(route.tier, self._family.id, route.split), request, payload)

    def _route_by(self, path: _Path) -> Route | NoRoute:
        if not path.link.connected:
            return NoRoute(f"no connection to {path.target.address}")
        refusal = f"no server at {path.target.address}"
        best: NodeStatus | None = None
        for status in path.link.nodes.values():
            why = self._refusal(status)
            if why:
                refusal = why
            elif best is None or self._rank(status) < self._rank(best):
                best = status
        if best is None:
            return NoRoute(refusal)
        round_trip_s = path.link.round_trip_s
        estimate = LinkEstimate(FIRST_ROUND_TRIP_S if round_trip_s is None else round_trip_s, best.queue_ms / 1e3)
        return Route(best.node, best.tier, self._split, self._codec, estimate)

    def _rank(self, status: NodeStatus) -> tuple[int, float, str]:
        return self._tiers.index(status.tier), status.queue_ms, status.node

    def _refusal(self, status: NodeStatus) -> str:
        """Why this node cannot be asked; empty when it can."""
        if status.tier not in self._tiers:
            return f"{status.node} is of the tier {status.tier}, {' or '.join(self._tiers)} is asked"
        if status.state != "ready":
            return f"{status.node} is {status.state}"
        for served in status.families:
            if served.family == self._family.id:
                if served.version != self._family.version:
                    found = f"{served.family} {served.version}"
                    return f"{status.node} serves {found}, this is {self._family.version}"
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
                event(log, logging.WARNING, "uplink failed", error=str(exc))
            with self._routable:
                self._routable.notify_all()
            self._changed.wait(CHECK_INTERVAL_S)
            self._changed.clear()

    def _supervise(self, now_s: float) -> None:
        """Close what is no longer used; make the first link, or a better one."""
        for entry in [entry for entry in self._retired if entry[0] <= now_s]:
            self._retired.remove(entry)
            entry[1].close()
        path = self._path
        usable = path is not None and isinstance(self._route_by(path), Route)
        if usable or path is None:
            self._unusable_since_s = now_s
        target = self._choose(path, usable, now_s)
        if target is not None and (path is None or target.address != path.target.address):
            self._replace(path, target)

    def _choose(self, path: _Path | None, usable: bool, now_s: float) -> _Target | None:
        """The broker to be linked to now; the current one means: stay."""
        if self._browser is None:
            return self._fixed
        targets = [target for target in self._announced() if self._avoided_until_s.get(target.address, 0.0) <= now_s]
        if path is None:
            patient = now_s - self._started_s < PATIENCE_S
            return targets[0] if targets and not (patient and targets[0].rank > 0) else None
        if usable:
            nearer = [target for target in targets if target.rank < path.target.rank]
            return nearer[0] if nearer else path.target
        if now_s - self._unusable_since_s < GIVE_UP_S:
            return path.target
        others = [target for target in targets if target.address != path.target.address]
        return others[0] if others else path.target

    def _announced(self) -> list[_Target]:
        """Announced servers of this family, the nearest tier first, then by name."""
        assert self._browser is not None
        nodes = [
            node
            for node in self._browser.nodes()
            if node.tier in self._tiers and (self._family.id, self._family.version) in node.families
        ]
        nodes.sort(key=lambda node: (self._tiers.index(node.tier), node.node))
        return [_Target(BrokerAddress(node.host, node.port), self._tiers.index(node.tier)) for node in nodes]

    def _replace(self, old: _Path | None, target: _Target) -> None:
        """Link to `target`; keep the old link when the new one does not work out."""
        self._links_made += 1
        # A client id of its own for each link: old and new may meet at one broker.
        link = Link(target.address, f"{self._client_id}-{self._links_made}", on_status=self._poke)
        path = _Path(target, link)
        link.start()
        if old is not None:
            give_up_s = time.monotonic() + TRIAL_S
            while not isinstance(self._route_by(path), Route):
                if time.monotonic() > give_up_s or self._stop.is_set():
                    self._avoided_until_s[target.address] = time.monotonic() + AVOID_S
                    link.close()
                    return
                self._stop.wait(0.02)
            self._retired.append((time.monotonic() + RETIRE_S, old.link))
        self._path = path
        event(log, logging.INFO, "uplink", broker=str(target.address))
