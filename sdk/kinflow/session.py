"""The MQTT 5 session of one connection; the one adapter file for paho-mqtt.

paho does what happens now and then: CONNECT, will, SUBSCRIBE, keepalive, DISCONNECT. What it wants to send it
only queues, and it reads when told to: mqtt.py decides when.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from kinflow.address import BrokerAddress
from kinflow.errors import LinkLost, SettingsError
from kinflow.frame import MAX_FRAME_BYTES
from kinflow.tls import Credentials, explain
from kinflow.tunnel import Tunnel

log = logging.getLogger("kinflow.link")

CONNECT_TIMEOUT_S = 3.0
MAX_PACKET_BYTES = MAX_FRAME_BYTES + 1024
# Much larger than the defaults: 0.6 of the latency at 128 kB, several times the throughput.
_SOCKET_BUFFER_BYTES = 512 * 1024


class Session:
    """Everything but PUBLISH at QoS 0. One thread at a time; `on_ready` runs inside `read`."""

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        subscriptions: Sequence[str],
        will: tuple[str, bytes] | None,
        login: tuple[str, str] | None,
        keepalive_s: int,
        on_ready: Callable[[], None],
        tls: Credentials | None = None,
    ) -> None:
        self._address = address
        self._name = client_id
        self._subscriptions = tuple(subscriptions)
        self._keepalive_s = keepalive_s
        self._on_ready = on_ready
        self._distrusted = ""
        client = self._client = _Client(address, client_id, tls)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if will is not None:
            client.will_set(will[0], will[1], qos=0, retain=True)
        if login is not None:
            client.username_pw_set(*login)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_socket_open = self._opened
        # With this set, paho queues what it sends until `write`.
        client.on_socket_register_write = lambda *_: None

    def connect(self) -> None:
        """Open the socket and queue CONNECT. Blocks while the name resolves and the host answers; LinkLost."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        host, port = self._address.host, self._address.port
        try:
            self._client.connect(host, port, self._keepalive_s, clean_start=True, properties=properties)
        except ssl.SSLError as exc:
            raise self._distrust(explain(exc)) from exc
        except SettingsError as exc:  # the files were there at the start
            raise self._distrust(str(exc)) from exc
        except (OSError, ValueError) as exc:  # UnicodeError of an impossible host name is a ValueError
            raise LinkLost(f"no connection to {self._address}: {exc}") from exc

    def _distrust(self, why: str) -> LinkLost:
        # Told once, not at every attempt: it needs somebody's hand, and nothing else would say so.
        if why != self._distrusted:
            log.warning("%s: no TLS connection to %s: %s", self._name, self._address, why)
            self._distrusted = why
        return LinkLost(f"no TLS connection to {self._address}: {why}")

    @property
    def open(self) -> bool:
        return self._client.socket() is not None

    def duplicate_socket(self) -> socket.socket:
        """A socket of one's own: paho may close its at any time, which must not pull it away from a sender."""
        sock = self._client.socket()
        if not isinstance(sock, socket.socket):
            raise LinkLost(f"the connection to {self._address} ended")
        return sock.dup()

    @property
    def wants_write(self) -> bool:
        """Whether something is queued, or on the wire in part: then nothing else may be sent."""
        return self._client.want_write()

    def write(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        self._client.loop_write()

    def read(self) -> None:
        """Read one packet. It must be there whole: whether paho waits for the rest of one cannot be asked."""
        self._client.loop_read()

    def tick(self) -> None:
        """Keep alive: to be called several times per keepalive."""
        self._client.loop_misc()

    def disconnect(self) -> None:
        """Send DISCONNECT, so that there is no will, and close."""
        self._client.disconnect()
        self._client.loop_write()

    def drop(self, sock: socket.socket) -> None:
        """Close at once: the socket takes nothing more, so that paho fails to send and closes."""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self.disconnect()

    def linger(self) -> None:
        """After the end: wait until what was sent last is out, so that the process may end."""
        self._client.linger()

    # paho's callbacks

    def _opened(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        if sock.family != socket.AF_UNIX:  # a tunnel's near side
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)

    def _connected(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("%s: %s refused the connection: %s", self._name, self._address, reason)
        elif self._subscriptions:
            client.subscribe([(topic, SubscribeOptions(qos=0)) for topic in self._subscriptions])
        else:
            self._on_ready()

    def _subscribed(
        self, client: paho.Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [topic for topic, reason in zip(self._subscriptions, reasons, strict=False) if reason.is_failure]
        if refused or len(reasons) != len(self._subscriptions):
            log.warning("%s: %s refused to subscribe to %s", self._name, self._address, ", ".join(refused))
            client.disconnect()
        else:
            self._on_ready()

    def _disconnected(
        self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        log.debug("%s: connection to %s ended: %s", self._name, self._address, reason)


class _Client(paho.Client):
    """paho's client, over a Tunnel when there are credentials."""

    def __init__(self, address: BrokerAddress, client_id: str, tls: Credentials | None) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self._address = address
        self._credentials = tls
        self._tunnel: Tunnel | None = None

    def _create_socket(self) -> Any:
        sock: Any = super()._create_socket()
        if self._credentials is None:
            return sock
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(CONNECT_TIMEOUT_S)
            secured = stack.enter_context(self._credentials.client_context().wrap_socket(sock))
            self._credentials.check_server(secured.getpeercert())
            stack.pop_all()
        self._tunnel = Tunnel(secured, f"{self._address}")
        self._tunnel.start()
        return self._tunnel.near

    def linger(self) -> None:
        if self._tunnel is not None:
            self._tunnel.join()
