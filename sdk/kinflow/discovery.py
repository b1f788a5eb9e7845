"""Browse and advertise `_kinflow._tcp.local.` with python-zeroconf. An advert is a hint, never trusted.

An advert is one DNS-SD instance: its SRV record holds the MQTT broker's port, its A records the addresses,
its TXT record what advert.py says.

A device may start before its network does. So starting never fails for want of a network: Browser and Advert
follow the machine's addresses as they come and go, and `check()` raises DiscoveryError while nothing works.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import zeroconf

from kinflow.advert import Node, advertised_addresses, local_networks, nearest, read_advert, write_advert
from kinflow.errors import DiscoveryError
from kinflow.logs import event

__all__ = ["Advert", "Browser", "Node", "advertised_addresses"]

log = logging.getLogger("kinflow.discovery")

SERVICE = "_kinflow._tcp.local."
# A server that died without a goodbye is forgotten after this; zeroconf's own default is 75 minutes.
TTL_S = 120
WATCH_INTERVAL_S = 3.0
RESOLVE_TIMEOUT_MS = 1500
# A noisy or hostile LAN must not fill the memory.
MAX_NODES = 256
MAX_LABEL_BYTES = 63

ANY_ADDRESS = "0.0.0.0"
_FAILURES = (OSError, RuntimeError, ValueError, zeroconf.Error)


A = TypeVar("A", bound="_Attached")


class _Attached(ABC):
    """Owns one Zeroconf, and makes a new one whenever the addresses to use have changed."""

    def __init__(self, interfaces: Sequence[str]) -> None:
        self._interfaces = tuple(interfaces)
        self._zeroconf: zeroconf.Zeroconf | None = None
        self._addresses: tuple[str, ...] = ()
        self._error: DiscoveryError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self: A) -> A:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Raises nothing for want of a network: see `check`."""
        if self._thread is not None:
            return
        self._attach()
        self._thread = threading.Thread(target=self._watch, name="kinflow-discovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._detach()

    def check(self) -> None:
        """Raises DiscoveryError while zeroconf does not work here, with the reason."""
        if self._error is not None:
            raise self._error

    @abstractmethod
    def _attached(self, instance: zeroconf.Zeroconf) -> None: ...

    def _wanted(self) -> tuple[str, ...]:
        present = local_networks()
        return tuple(sorted(set(self._interfaces or present) & set(present)))

    def _watch(self) -> None:
        warned = False
        while not self._stop.wait(WATCH_INTERVAL_S):
            # Not at the start: check() tells whoever wants to know, and a network may come a little later.
            if self._error is not None and not warned:
                event(log, logging.WARNING, "discovery unavailable", error=self._error)
            warned = self._error is not None
            if self._error is not None or self._moved():
                self._detach()
                self._attach()

    def _moved(self) -> bool:
        try:
            return self._wanted() != self._addresses
        except OSError as exc:
            event(log, logging.DEBUG, "no addresses", error=exc)
            return False

    def _attach(self) -> None:
        try:
            addresses = self._wanted()
            if not addresses:
                asked = ", ".join(self._interfaces) or "an IPv4 address"
                found = ", ".join(local_networks()) or "none"
                raise DiscoveryError(f"no interface has {asked}; the addresses here are: {found}")
            self._addresses = addresses
            self._zeroconf = _open(addresses)
            self._attached(self._zeroconf)
        except (*_FAILURES, DiscoveryError) as exc:
            error = exc
            if not isinstance(error, DiscoveryError):
                error = DiscoveryError(f"zeroconf cannot start: {exc!r}")
            self._error = error
            self._detach()
        else:
            if self._error is not None:
                event(log, logging.INFO, "discovery available", addresses=list(self._addresses))
            self._error = None

    def _detach(self) -> None:
        instance, self._zeroconf = self._zeroconf, None
        if instance is None:
            return
        try:
            # Sends the goodbyes and waits for them: unregister_service would return before they are out.
            instance.unregister_all_services()
        except _FAILURES as exc:
            event(log, logging.DEBUG, "no goodbye", error=exc)
        try:
            instance.close()
        except _FAILURES as exc:
            event(log, logging.DEBUG, "not closed", error=exc)


class Browser(_Attached):
    """Keeps the list of servers that are announced. `interfaces`: IPv4 addresses to use; empty: all.

    A browser on loopback addresses alone lists nodes on loopback alone. `on_change` is called on a thread of
    the browser's own.
    """

    def __init__(self, *, interfaces: Sequence[str] = (), on_change: Callable[[], None] | None = None) -> None:
        super().__init__(interfaces)
        self._on_change = on_change
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] = {}

    def nodes(self) -> tuple[Node, ...]:
        """What is announced now, by name. Safe to call from any thread."""
        with self._lock:
            return tuple(sorted(self._nodes.values(), key=lambda node: (node.node, node.host, node.port)))

    def _attached(self, instance: zeroconf.Zeroconf) -> None:
        with self._lock:
            had_nodes = bool(self._nodes)
            self._nodes.clear()
        if had_nodes:
            self._changed()
        zeroconf.ServiceBrowser(instance, SERVICE, listener=_Listener(self))

    def _resolve(self, instance: zeroconf.Zeroconf, name: str) -> None:
        info = zeroconf.ServiceInfo(SERVICE, name)
        try:
            if not info.load_from_cache(instance) and not info.request(instance, RESOLVE_TIMEOUT_MS):
                raise DiscoveryError("its host does not answer")
            addresses = info.parsed_addresses(zeroconf.IPVersion.V4Only)
            node = read_advert(info.properties, nearest(addresses, self._addresses), info.port)
        except (*_FAILURES, DiscoveryError) as exc:
            event(log, logging.DEBUG, "advert ignored", advert=name, error=exc)
            return
        with self._lock:
            if instance is not self._zeroconf or self._nodes.get(name) == node:
                return
            if name not in self._nodes and len(self._nodes) >= MAX_NODES:
                # Whoever came first must not keep the others out.
                del self._nodes[random.choice(list(self._nodes))]
            self._nodes[name] = node
        self._changed()

    def _removed(self, name: str) -> None:
        with self._lock:
            known = self._nodes.pop(name, None)
        if known is not None:
            self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()


class _Listener(zeroconf.ServiceListener):
    """python-zeroconf's interface, kept out of Browser's."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def add_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._browser._resolve(zc, name)

    def update_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._browser._resolve(zc, name)

    def remove_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._browser._removed(name)


class Advert(_Attached):
    """Announces `node` while it is open; closing says goodbye.

    Raises DiscoveryError for a node that no advert can describe. A node on a loopback address is announced on
    loopback alone: elsewhere the address would mean the listener's own machine.
    """

    def __init__(self, node: Node, *, interfaces: Sequence[str] = ()) -> None:
        host = "127.0.0.1" if node.host == "localhost" else node.host
        if not interfaces and host.startswith("127."):
            interfaces = (host,)
        super().__init__(interfaces)
        self._host = host
        self._port = node.port
        try:
            self._txt = write_advert(node)
        except DiscoveryError as exc:
            raise DiscoveryError(f"{node!r} cannot be announced: {exc}") from exc
        self._label = node.node.replace(".", "-")[: MAX_LABEL_BYTES - len("kinflow-")]

    def _attached(self, instance: zeroconf.Zeroconf) -> None:
        # Node names are chosen to be unique; probing for conflicts would take more than a second.
        instance.register_service(self._info(), cooperating_responders=True)

    def _info(self) -> zeroconf.ServiceInfo:
        if self._host == ANY_ADDRESS:
            addresses = list(advertised_addresses(self._interfaces))
        else:
            addresses = [socket.gethostbyname(self._host)]
        return zeroconf.ServiceInfo(
            SERVICE,
            f"{self._label}.{SERVICE}",
            parsed_addresses=addresses,
            port=self._port,
            properties=self._txt,
            # Not `<label>.local.`: a node named like its host would take that name from the host.
            server=f"kinflow-{self._label}.local.",
            host_ttl=TTL_S,
            other_ttl=TTL_S,
        )


def _open(addresses: Sequence[str]) -> zeroconf.Zeroconf:
    def make() -> zeroconf.Zeroconf:
        return zeroconf.Zeroconf(interfaces=list(addresses), ip_version=zeroconf.IPVersion.V4Only)

    # In a thread of its own: on a thread that runs an asyncio loop, Zeroconf would move into that loop.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
