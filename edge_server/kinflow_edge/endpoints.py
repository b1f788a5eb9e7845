"""`/live`, `/ready` and `/metrics` over HTTP, for whoever looks after a server: systemd, Kubernetes, Prometheus.

Live: the process still turns, or it should be restarted. Ready: a real inference succeeded end to end, or it
should not be asked. Only GET, nothing is read from the request but its path.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from kinflow.errors import SettingsError
from kinflow.settings import HttpSettings
from kinflow_edge.metrics import ServerMetrics

if TYPE_CHECKING:
    from kinflow_edge.server import Server

JSON = "application/json"


class Endpoints:
    """Served while the `with` block lasts; `address` says where."""

    def __init__(self, settings: HttpSettings, server: Server) -> None:
        self._settings = settings
        self._server = server
        self._registry = CollectorRegistry()
        self._registry.register(ServerMetrics(server))
        self._http: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """host:port"""
        assert self._http is not None
        return f"{self._http.server_address[0]!s}:{self._http.server_address[1]}"

    def __enter__(self) -> Endpoints:
        wanted = (self._settings.listen, self._settings.port)
        endpoints = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0  # a client that says nothing does not hold a thread for longer

            def do_GET(self) -> None:
                status, kind, body = endpoints.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Probes come every few seconds: not a line for each."""

        try:
            self._http = ThreadingHTTPServer(wanted, Handler)
        except OSError as exc:
            raise SettingsError(
                f"http: {wanted[0]}:{wanted[1]} cannot be bound ({exc.strerror}): another port with --http-port, 0: any"
            ) from exc
        self._thread = threading.Thread(target=self._http.serve_forever, name="kinflow-http", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._http is not None and self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """(status, content type, body)"""
        server = self._server
        if path == "/live":
            return (200 if server.live else 503), JSON, _json(live=server.live)
        if path == "/ready":
            ready = server.state == "ready"
            trouble = "" if ready else server.trouble
            said = _json(ready=ready, state=server.state, node=server.node, tier=server.tier, trouble=trouble)
            return (200 if ready else 503), JSON, said
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        return 404, JSON, _json(error=f"{path[:100]!r} is not served here: /live, /ready and /metrics are")


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"
