"""The endpoint's server: who may ask, how many at once, and how it stops."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kinflow.api.handler import Handler
from kinflow.api.request import Refused
from kinflow.errors import SettingsError
from kinflow.logs import event
from kinflow.settings import ServeSettings
from kinflow.text.device import TextDevice
from kinflow.tls import is_loopback

log = logging.getLogger("kinflow.api")

# Open connections, most of them idle; texts are counted apart.
MAX_CONNECTIONS = 128
# What texts under way get to say that the server stops.
STOP_S = 5.0


class Endpoint:
    """Served while the `with` block lasts; `address` says where."""

    def __init__(self, device: TextDevice, settings: ServeSettings, *, insecure_lan: bool = False) -> None:
        """Raises SettingsError for a key or certificate that is none, and for what may not leave loopback."""
        self.device = device
        self._settings = settings
        self.key = _read_key(settings.key_file) if settings.key_file else ""
        self._tls = _tls(settings)
        if not is_loopback(settings.listen) and not insecure_lan and not (self.key and self._tls):
            raise SettingsError(
                f"serve.listen is {settings.listen}, beyond loopback: set serve.key_file and serve.certificate, "
                "or --insecure-lan"
            )
        owner = {"object": "model", "created": 0, "owned_by": "kinflow"}
        self.models = {name: {"id": name, **owner} for name in (device.family.id, *settings.models)}
        self.stopping = False
        self._slots = threading.BoundedSemaphore(settings.parallel)
        self._http: HttpServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """The base URL that a client is given."""
        assert self._http is not None
        host, port = self._http.server_address[:2]
        return f"{'https' if self._tls else 'http'}://{host!s}:{port}/v1"

    def model(self, name: str) -> dict[str, Any]:
        """Raises Refused."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"the model {name[:80]!r} is not here: {known}", code="model_not_found", param="model")
        return self.models[name]

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Room for one text. Raises Refused where there is none."""
        if not self._slots.acquire(blocking=False):
            raise Refused(429, f"{self._settings.parallel} texts are being generated: try again", code="busy")
        try:
            yield
        finally:
            self._slots.release()

    def __enter__(self) -> Endpoint:
        wanted = (self._settings.listen, self._settings.port)
        try:
            self._http = HttpServer(wanted, self, self._tls)
        except OSError as exc:
            raise SettingsError(
                f"serve: {wanted[0]}:{wanted[1]} cannot be bound ({exc.strerror}): another port with --port, 0: any"
            ) from exc
        self._thread = threading.Thread(target=self._http.serve_forever, name="kinflow-api", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stopping = True
        assert self._http is not None
        assert self._thread is not None
        self._http.shutdown()
        self._thread.join()
        for _ in range(self._settings.parallel):
            self._slots.acquire(timeout=STOP_S / self._settings.parallel)
        self._http.server_close()


class HttpServer(ThreadingHTTPServer):
    """A thread per connection, a bounded number of them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], endpoint: Endpoint, tls: ssl.SSLContext | None) -> None:
        self.endpoint = endpoint
        self._tls = tls
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        if self._tls is not None:
            # The handshake waits for the client: it belongs on the connection's own thread.
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, client

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            event(log, logging.WARNING, "too many connections", most=MAX_CONNECTIONS)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            event(log, logging.DEBUG, "connection broke", error=str(error))
        else:
            log.error("request failed", exc_info=error)


def _read_key(file: str) -> str:
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"serve.key_file {file}: {exc}") from exc
    if not key.isprintable() or not key or " " in key:
        raise SettingsError(f"serve.key_file {file} must hold one key, printable and without spaces")
    return key


def _tls(settings: ServeSettings) -> ssl.SSLContext | None:
    if not settings.certificate and not settings.certificate_key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.certificate, settings.certificate_key or None)
    except OSError as exc:  # ssl.SSLError is one
        raise SettingsError(f"serve.certificate {settings.certificate!r}: {exc}") from exc
    return context
