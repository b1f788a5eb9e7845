"""One server process: broker, connection, worker, uplink, advert and retained status, with one lifetime."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

from kinflow import __version__, frame, topics
from kinflow.address import parse_all
from kinflow.bundle import task_of
from kinflow.discovery import Advert, Node
from kinflow.errors import LinkError, SettingsError
from kinflow.family import Family
from kinflow.logs import event
from kinflow.messages import NodeStatus, State, Tier
from kinflow.mqtt import BrokerAddress, Connection
from kinflow.settings import ServerSettings
from kinflow.signing import TrustedKeys
from kinflow.stopping import Stop
from kinflow.text.family import TextFamily
from kinflow.text.manifest import TASK
from kinflow.tls import Credentials, is_loopback, refuse_plain
from kinflow.uplink import Uplink
from kinflow_edge.broker import Broker
from kinflow_edge.endpoints import Endpoints
from kinflow_edge.model import ServedFamily
from kinflow_edge.selftest import SelfTest
from kinflow_edge.shelf import Shelf
from kinflow_edge.text.model import ServedText
from kinflow_edge.workers import Model, Workers

log = logging.getLogger("kinflow.server")

CONNECT_TIMEOUT_S = 10.0
# How often the broker is looked after; a status is published at its own interval.
WATCH_INTERVAL_S = 0.2
# Restarting a broker takes that long at most; a server that has not turned for longer is stuck.
STUCK_S = 15.0
# A draining server waits for so much silence: what was sent before its devices heard of it has come by then.
QUIET_S = 0.5


class Server:
    """An edge or cloud server. `with Server(tier, settings) as server: server.run(stop)`."""

    def __init__(self, tier: Tier, settings: ServerSettings) -> None:
        """Opens the bundles, starts nothing. Raises SettingsError, BundleError, FamilyMismatch, BackendError."""
        if not settings.bundles:
            raise SettingsError("no bundle to serve: name one as an argument, or in `bundles` of the settings")
        self.tier = tier
        self.settings = settings
        self.broker = Broker(settings.broker, settings.tls)
        self._credentials = self.broker.credentials
        self.node = _node_name(tier, settings, self._credentials)
        self.insecure = _insecurity(settings)
        self._models: dict[str, Model] = {}
        trusted = TrustedKeys.parse(settings.trusted_keys)
        for path in settings.bundles:
            self._open(path, trusted)
        self._stack = ExitStack()
        self._status_at_s = 0.0
        self._turned_s = time.monotonic()
        self._draining = False
        self._advert: Advert | None = None
        self.uplinks: dict[str, Uplink] = {}
        self.endpoints = Endpoints(settings.http, self)

    def _open(self, path: str, trusted: TrustedKeys) -> None:
        member, threads = self.settings.member or self.tier, self.settings.threads
        family = TextFamily.load(path, trusted=trusted) if task_of(path) == TASK else Family.load(path, trusted=trusted)
        if family.id in self._models:
            raise SettingsError(f"bundles: {path} is a second bundle of the family {family.id!r}")
        if isinstance(family, TextFamily):
            self._models[family.id] = ServedText.open(family, member, threads)
        else:
            self._models[family.id] = ServedFamily.open(family, member, threads)

    def __enter__(self) -> Server:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        for model in self._models.values():
            model.warm_up()
        stack.enter_context(self.broker)
        if self.insecure:
            log.warning("%s", self.insecure)
        if self.settings.upstream:
            self.uplinks = {family: self._uplink(model) for family, model in self._models.items()}
        self._connection = Connection(
            self.broker.address,
            _client_id(self.tier),
            on_message=self._on_message,
            subscriptions=self._subscriptions(),
            will=(topics.status(self.node), frame.pack(NodeStatus(self.node, self.tier, "offline"))),
            on_connected=self._renew_status,
            tls=self._credentials,
        )
        test_client = self._test_client()
        self.workers = Workers(
            self.node, self.tier, self._models, self.settings, self._connection, self.uplinks, test_client
        )
        families = {name: model.family for name, model in self._models.items()}
        self.shelf = Shelf(self.node, families, self._connection.publish, self.settings.pull_bytes_per_s)
        # Closed in the opposite order: the worker answers what it has admitted, the uplinks give up what they
        # still wait for (it is answered with this tier's own exit), and the connection goes last.
        stack.enter_context(self._connection)
        for uplink in self.uplinks.values():
            uplink.start()
            stack.callback(uplink.close)
        self.workers.start(stack.callback)
        stack.callback(self._say_offline)
        if not self._connection.wait_connected(CONNECT_TIMEOUT_S):
            raise LinkError(f"the broker at {self.broker.address} does not answer")
        self._test = SelfTest(self.node, self._models, self.broker.address, test_client, self._credentials)
        stack.callback(self._test.close)
        self._test.start()
        stack.enter_context(self.endpoints)
        if self.settings.advertise:
            self._advert = stack.enter_context(Advert(self._node(), interfaces=self._interfaces()))

    def _test_client(self) -> str:
        """Under what name the server asks itself."""
        return str(self._credentials.identity) if self._credentials else _client_id(f"{self.tier}-test")

    def _on_message(self, topic: str, data: frame.Buffer) -> None:
        if topics.asks_for_bundle(topic):
            self.shelf.on_message(topic, data)
        else:
            self.workers.on_message(topic, data)

    def _subscriptions(self) -> list[str]:
        alone = self._credentials is not None and not self.settings.broker.group
        group = "" if alone else self.settings.broker.group or self.tier
        wanted = [topics.bundle_requests(self.tier, family, group) for family in self._models]
        for family, model in self._models.items():
            if isinstance(model, ServedText):
                # A session lives on one node: its requests name it.
                wanted += [topics.request_to(self.node, family, source, "+") for source in model.sources]
                continue
            for split in model.entries:
                wanted.append(topics.requests(self.tier, family, split, group))
                wanted.append(topics.request_to(self.node, family, split, "+"))
        return wanted

    @property
    def state(self) -> State:
        if self._draining:
            return "draining"
        return "failing" if self._test.trouble else "ready"

    @property
    def trouble(self) -> str:
        """Why it is not ready."""
        return "it is about to stop" if self._draining else self._test.trouble

    @property
    def live(self) -> bool:
        """Its threads still turn: one that hangs does not come back by itself."""
        return self.workers.alive and time.monotonic() - self._turned_s < STUCK_S

    def run(self, stop: Stop, on_broker_restart: Callable[[], None]) -> None:
        """Look after the broker, the self-test and the status until `stop` is set; then drain."""
        last_s, busy_s, state = time.monotonic(), self.workers.busy_s, self.state
        while not stop.wait(WATCH_INTERVAL_S):
            if self.broker.restart_if_dead() or self.broker.restart_if_stale():
                on_broker_restart()
            now_s = self._turned_s = time.monotonic()
            self._test.step(now_s)
            if now_s >= self._status_at_s or self.state != state:
                load = (self.workers.busy_s - busy_s) / (now_s - last_s)
                last_s, busy_s, state = now_s, self.workers.busy_s, self.state
                self._publish_status(min(1.0, load))
                self._status_at_s = now_s + self.settings.status_interval_s
        self._drain()

    def _drain(self) -> None:
        """Say that it is about to stop, and answer until nobody asks any more."""
        self._draining = True
        self._publish_status(0.0)
        began_s = time.monotonic()
        if self._advert is not None:
            self._advert.close()
        while (now_s := time.monotonic()) - began_s < self.settings.drain_s:
            last_s = self.workers.last_request_s
            quiet = last_s is None or now_s - max(last_s, began_s) > QUIET_S
            if quiet and not self.workers.under_way:
                break
            time.sleep(0.02)

    def _uplink(self, model: Model) -> Uplink:
        if model.next_split is None:
            raise SettingsError(f"upstream is set, but nothing of {model.family.id} is above this member")
        return Uplink(
            model.family,
            _client_id(self.tier),
            tiers=("cloud",),
            brokers=parse_all(self.settings.upstream),
            tls=self.settings.tls,
        )

    def _renew_status(self) -> None:
        self._status_at_s = 0.0

    def _publish_status(self, load: float) -> None:
        self._publish(
            NodeStatus(
                node=self.node,
                tier=self.tier,
                state=self.state,
                software=__version__,
                families=self.workers.families,
                queue_ms=self.workers.queue_s * 1e3,
                load=load,
                served=self.workers.counts["served"],
                rejected=self.workers.rejected,
                insecure=bool(self.insecure),
            )
        )

    def _say_offline(self) -> None:
        self._publish(NodeStatus(self.node, self.tier, "offline"))

    def _publish(self, status: NodeStatus) -> None:
        try:
            self._connection.publish(topics.status(self.node), frame.pack(status), retain=True)
        except LinkError as exc:  # the broker is away: on_connected renews the status when it is back
            event(log, logging.INFO, "status not sent", error=str(exc))

    def _interfaces(self) -> list[str]:
        """Addresses for zeroconf: the settings' ones, else the broker's own; empty means all."""
        if self.settings.interfaces:
            return list(self.settings.interfaces)
        host = self.broker.address.host if self.settings.broker.address else self.settings.broker.listen
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return []
        return [] if address.is_unspecified else [host]

    def _node(self) -> Node:
        families = tuple((model.family.id, model.family.version) for model in self._models.values())
        address: BrokerAddress = self.broker.address
        host = address.host if self.settings.broker.address else self.settings.broker.listen
        return Node(self.node, self.tier, host, address.port, families, __version__)


def _node_name(tier: Tier, settings: ServerSettings, credentials: Credentials | None) -> str:
    """Under TLS the certificate's: the broker lets nobody else write that node's status."""
    if credentials is None:
        return settings.node or f"{socket.gethostname().split('.')[0][:32]}-{tier}"
    identity = credentials.identity
    if identity.role != tier:
        raise SettingsError(f"tls.folder {settings.tls.folder} is {identity}'s: a {tier} server needs {tier}.NAME")
    if settings.node not in ("", str(identity)):
        raise SettingsError(f"node is {settings.node!r}, but the certificate is {identity}'s: leave node out")
    shared = settings.broker.address or settings.broker.servers
    if shared and not settings.broker.group:
        raise SettingsError("servers that share a broker under TLS need broker.group, a secret name of their own")
    return str(identity)


def _insecurity(settings: ServerSettings) -> str:
    """What is beyond loopback without TLS; empty when nothing is. Raises SettingsError where that is not allowed."""
    broker = settings.broker
    host = BrokerAddress.parse(broker.address).host if broker.address else broker.listen
    if why := refuse_plain(settings.tls, host):
        raise SettingsError(why)
    return "" if settings.tls.folder or is_loopback(host) else f"no TLS on {host}: anybody there may read and answer"


def _client_id(prefix: str) -> str:
    """Unique: two clients with one id would take the broker's session from each other forever."""
    return f"{prefix}-{os.urandom(6).hex()}"
