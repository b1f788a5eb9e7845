"""Who is above: a link to each broker that is named or announced, a peer for each server that speaks there.

Devices use it for edge and cloud, edge servers for the cloud. A thread of its own makes and closes links and sends
probes, so that nothing here ever holds up an inference.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections.abc import Collection, Sequence
from typing import Protocol

from kinflow import topics
from kinflow.address import parse_all
from kinflow.crowd import Crowd
from kinflow.discovery import Browser
from kinflow.errors import KinflowError, SettingsError
from kinflow.frame import Buffer
from kinflow.link import Link
from kinflow.logs import event
from kinflow.messages import NodeStatus, Request, Tier
from kinflow.mqtt import BrokerAddress
from kinflow.peer import Attempt, Peer
from kinflow.policy import NoRoute, Offload, Rate, Route
from kinflow.resort import Resort
from kinflow.settings import DeviceSettings, TlsSettings
from kinflow.tls import Credentials, refuse_plain

log = logging.getLogger("kinflow.uplink")

CHECK_INTERVAL_S = 0.25
# A node that was not heard of for so long is probed.
PROBE_INTERVAL_S = 5.0
# A LAN may have many servers; a device keeps links to a few brokers beside the named ones. Where more are announced,
# some of those places are for trying them out one after the other.
MAX_ANNOUNCED = 6
TRIALS = 2
TRIAL_S = 3.0
# The link to a broker that is no longer announced stays open this long: requests may still be under way on it.
RETIRE_S = 10.0


class Versioned(Protocol):
    """What an uplink must know of a family."""

    @property
    def id(self) -> str: ...

    @property
    def version(self) -> str: ...


class Uplink:
    """Knows the servers of `tiers` that can continue `family`, and asks them in the order of resort."""

    def __init__(
        self,
        family: Versioned,
        client_id: str,
        *,
        tiers: Sequence[Tier],
        brokers: Sequence[BrokerAddress] = (),
        browse: bool = False,
        interfaces: Sequence[str] = (),
        tls: TlsSettings | None = None,
    ) -> None:
        """`tiers`: those that may be asked, the preferred one first. `browse`: use announced brokers too.

        Raises SettingsError when `tls` holds no valid certificate, or a named broker may not be asked without one.
        """
        self._tls = tls or TlsSettings()
        self._credentials = Credentials.load(self._tls)
        for address in brokers:
            if why := refuse_plain(self._tls, address.host):
                raise SettingsError(why)
        self._nothing_found = "no server found yet"
        self._tiers = tuple(tiers)
        self._family = family
        self._client_id = client_id
        self._named = tuple(brokers)
        self._browser = Browser(interfaces=interfaces, on_change=self._poke) if browse else None
        # Both are replaced, never changed: they are read on other threads.
        self._links: dict[BrokerAddress, Link] = {}
        self._peers: dict[str, Peer] = {}
        self._lock = threading.Lock()
        self._crowd = Crowd(MAX_ANNOUNCED, TRIALS, TRIAL_S)
        self._unwanted_since_s: dict[BrokerAddress, float] = {}
        self._closing: list[threading.Thread] = []
        self._links_made = 0
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kinflow-uplink", daemon=True)

    @classmethod
    def of_device(cls, family: Versioned, settings: DeviceSettings) -> Uplink:
        """A device's: to the named brokers, or those that are announced; the cloud when no edge server can be asked."""
        named = parse_all(settings.broker)
        return cls(
            family,
            f"device-{os.urandom(6).hex()}",
            tiers=("edge", "cloud"),
            brokers=(*named, *parse_all(settings.cloud)),
            browse=not named,
            interfaces=settings.interfaces,
            tls=settings.tls,
        )

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
        for link in self._links.values():
            self._close(link)
        for thread in self._closing:
            thread.join()

    def wait(self, split: str, rates: Sequence[Rate], timeout_s: float) -> bool:
        """True as soon as there is a route, False when there is none after `timeout_s`."""
        with self._news:
            return self._news.wait_for(lambda: not isinstance(self.routes(split, rates), NoRoute), timeout_s)

    @property
    def peers(self) -> Sequence[Peer]:
        """Every node that was heard of."""
        return tuple(self._peers.values())

    def routes(self, split: str, rates: Sequence[Rate]) -> Sequence[Route] | NoRoute:
        """Whom to ask to continue from `split`: the nearest tier first, in it whoever is expected to be fastest.

        `rates`: the codecs that may be used, the preferred one first.
        """
        now_s = time.monotonic()
        found: list[tuple[int, float, str, Route]] = []
        refusal = ""
        for peer in self._peers.values():
            status = peer.status
            if status is None:
                continue
            fitting, why = self._fitting(status, split, rates)
            if not why and peer.breaker.state(now_s) != "closed":
                why = f"{peer.node} did not answer {peer.breaker.failures} times and is left alone for a while"
            if why:
                refusal = why
                continue
            route = Route(peer.node, status.tier, split, fitting, peer.estimate)
            cost_s = route.estimate.cost_s(fitting[0].sent_bytes)
            found.append((self._tiers.index(status.tier), cost_s, peer.node, route))
        if not found:
            return NoRoute(refusal or self._nobody())
        if len(found) > 1:
            found.sort(key=lambda entry: entry[:3])
        return [entry[3] for entry in found]

    def request(self, offload: Offload, request_id: bytes, payload: Buffer, remaining_s: float) -> Resort:
        """Send coded features along `offload.route`, and further along the order of resort where that does not do.

        The future ends within `remaining_s`, see Resort.
        """
        deadline_s = time.monotonic() + remaining_s
        rate = Rate(offload.codec, len(payload))
        split = offload.route.split

        def ask(asked: Collection[str]) -> Attempt | None:
            now_s = time.monotonic()
            # Several nodes may be asked over one link: to tell their replies apart the id's last byte counts them.
            id_ = request_id[:-1] + bytes([(request_id[-1] + len(asked)) % 256])
            chosen = None if asked else self._peers.get(offload.route.node)
            if chosen is not None and chosen.link.connected:
                return self._ask(chosen, split, rate.codec, id_, payload, deadline_s - now_s)
            routes = self.routes(split, (rate,))
            for route in () if isinstance(routes, NoRoute) else routes:
                in_time = route.estimate.expected_s(rate.sent_bytes) <= deadline_s - now_s
                if route.node not in asked and in_time and (peer := self._peers.get(route.node)) is not None:
                    return self._ask(peer, split, rate.codec, id_, payload, deadline_s - now_s)
            return None

        return Resort(deadline_s, ask).begin()

    def _ask(
        self, peer: Peer, split: str, codec: str, request_id: bytes, payload: Buffer, remaining_s: float
    ) -> Attempt:
        request = Request(
            id=request_id,
            client=peer.link.client,
            family=self._family.id,
            version=self._family.version,
            split=split,
            codec=codec,
            deadline_ms=max(0.0, remaining_s) * 1e3,
        )
        return peer.ask(topics.request_to(peer.node, self._family.id, split, request.client), request, payload)

    def _fitting(self, status: NodeStatus, split: str, rates: Sequence[Rate]) -> tuple[tuple[Rate, ...], str]:
        """The rates that this node takes, or why it cannot be asked."""
        if status.tier not in self._tiers:
            return (), f"{status.node} is of the tier {status.tier}, {' or '.join(self._tiers)} is asked"
        if status.state != "ready":
            return (), f"{status.node} is {status.state}"
        for served in status.families:
            if served.family == self._family.id:
                if served.version != self._family.version:
                    found = f"{served.family} {served.version}"
                    return (), f"{status.node} serves {found}, this is {self._family.version}"
                taken = served.splits.get(split, [])
                if fitting := tuple([rate for rate in rates if rate.codec in taken]):
                    return fitting, ""
                wanted = " or ".join(rate.codec for rate in rates)
                return (), f"{status.node} does not take {wanted} at split {split}"
        return (), f"{status.node} does not serve {self._family.id}"

    def _nobody(self) -> str:
        for address, link in self._links.items():
            return f"no server at {address}" if link.connected else f"no connection to {address}"
        return self._nothing_found

    def peer(self, node: str) -> Peer | None:
        """The node of that name, while it is there: a session stays with the server that holds its cache."""
        peer = self._peers.get(node)
        return peer if peer is not None and peer.status is not None else None

    # The uplink's thread

    def _poke(self) -> None:
        self._changed.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._changed.clear()
            try:
                self._follow(time.monotonic())
                self._probe(time.monotonic())
            except KinflowError as exc:
                event(log, logging.WARNING, "uplink failed", error=str(exc))
            with self._news:
                self._news.notify_all()
            self._changed.wait(CHECK_INTERVAL_S)

    def _follow(self, now_s: float) -> None:
        """Link to what is named or announced; close what has not been for a while."""
        wanted = list(dict.fromkeys((*self._named, *self._announced(now_s))))
        for address in wanted:
            self._unwanted_since_s.pop(address, None)
            if address not in self._links:
                self._connect(address)
        for address in [address for address in self._links if address not in wanted]:
            unwanted_s = now_s - self._unwanted_since_s.setdefault(address, now_s)
            if unwanted_s > RETIRE_S or self._crowd.gave_way(address):
                self._disconnect(address)

    def _announced(self, now_s: float) -> list[BrokerAddress]:
        """Brokers of announced servers of this family: the nearest tier first, in it an order of this client's own.

        That order spreads many devices over many servers (rendezvous hashing). Of too many, those that work.
        """
        if self._browser is None:
            return []
        nodes = [
            node
            for node in self._browser.nodes()
            if node.tier in self._tiers and (self._family.id, self._family.version) in node.families
        ]
        refused = [why for node in nodes if (why := refuse_plain(self._tls, node.host))]
        if refused:
            self._nothing_found = refused[0]
            nodes = [node for node in nodes if not refuse_plain(self._tls, node.host)]
        nodes.sort(key=lambda node: (self._tiers.index(node.tier), zlib.crc32(f"{self._client_id}{node}".encode())))
        addresses = list(dict.fromkeys(BrokerAddress(node.host, node.port) for node in nodes))
        links = {peer.link for peer in self._peers.values() if peer.status is not None}
        working = [address for address, link in self._links.items() if link.connected and link in links]
        return self._crowd.choose(addresses, working, now_s)

    def _connect(self, address: BrokerAddress) -> None:
        self._links_made += 1
        # A client id of its own for each link: two may meet at one broker.
        client_id = f"{self._client_id}-{self._links_made}"
        link = Link(address, client_id, on_status=lambda status: self._heard(address, status), tls=self._credentials)
        self._links = {**self._links, address: link}
        link.start()
        event(log, logging.INFO, "link opened", broker=str(address))

    def _disconnect(self, address: BrokerAddress) -> None:
        link = self._links[address]
        del self._unwanted_since_s[address]
        self._links = {other: kept for other, kept in self._links.items() if other != address}
        with self._lock:
            self._peers = {node: peer for node, peer in self._peers.items() if peer.link is not link}
        self._close(link)
        event(log, logging.INFO, "link closed", broker=str(address))

    def _close(self, link: Link) -> None:
        """On a thread of its own: a connect that hangs may hold it up for seconds."""
        thread = threading.Thread(target=link.close, name="kinflow-uplink-close", daemon=True)
        thread.start()
        self._closing = [closing for closing in self._closing if closing.is_alive()] + [thread]

    def _heard(self, address: BrokerAddress, status: NodeStatus) -> None:
        """A network thread: a node said something at this broker."""
        link = self._links.get(address)
        if link is None:
            return
        with self._lock:
            peer = self._peers.get(status.node)
            # The same node may be seen on two links: the first one that works is used.
            if peer is None or (peer.link is not link and peer.status is None):
                peer = Peer(status.node, link)
                self._peers = {**self._peers, status.node: peer}
        if peer.link is link:
            peer.said(status)
        self._poke()

    def _probe(self, now_s: float) -> None:
        for peer in self._peers.values():
            status = peer.status
            if status is None:
                peer.lost()
                continue
            served = next((served for served in status.families if served.family == self._family.id), None)
            if status.state == "ready" and status.tier in self._tiers and served is not None and served.splits:
                topic = topics.request_to(peer.node, self._family.id, next(iter(served.splits)), peer.link.client)
                peer.probe_if_due(topic, now_s, PROBE_INTERVAL_S)
