"""One connection of the endpoint: HTTP around `Completion`. Server-sent events as OpenAI's API streams them."""

from __future__ import annotations

import hmac
import logging
import select
import time
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, cast

import msgspec

from kinflow.api.completion import Completion
from kinflow.api.request import Asked, Refused, parse
from kinflow.errors import KinflowError
from kinflow.logs import event
from kinflow.tls import is_loopback

if TYPE_CHECKING:
    from kinflow.api.endpoint import Endpoint, HttpServer

log = logging.getLogger("kinflow.api")

MAX_BODY_BYTES = 1 << 20
# Read and thrown away, so that whoever sends too much reads the answer instead of a broken pipe.
MAX_DRAINED_BYTES = 16 << 20
POLL_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Handler(BaseHTTPRequestHandler):
    """GET /v1/models, GET /v1/models/ID, POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    server_version = "kinflow"
    sys_version = ""
    # A client that says nothing does not hold a thread for longer.
    timeout = 30.0
    disable_nagle_algorithm = True

    @property
    def _endpoint(self) -> Endpoint:
        return cast("HttpServer", self.server).endpoint

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Callable[[], None]) -> None:
        self._streaming = False
        try:
            self._body = self._read_body()
            self._check_client()
            work()
        except Refused as exc:
            self._refuse(exc)
        except KinflowError as exc:
            event(log, logging.ERROR, "text failed", error=str(exc))
            self._refuse(Refused(500, str(exc), code=exc.code))
        except ConnectionError as exc:
            event(log, logging.INFO, "client gone", error=str(exc))
            self.close_connection = True

    def _get(self) -> None:
        models = self._endpoint.models
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": list(models.values())})
        elif self.path.startswith("/v1/models/"):
            self._send(200, self._endpoint.model(self.path.removeprefix("/v1/models/")))
        else:
            raise _unknown_path(self.path)

    def _post(self) -> None:
        if self.path != "/v1/chat/completions":
            raise _unknown_path(self.path)
        asked = parse(self._body)
        self._endpoint.model(asked.model)
        with self._endpoint.slot():
            start_s = time.monotonic()
            completion = Completion(self._endpoint.device, asked)
            try:
                self._stream(completion, asked) if asked.stream else self._whole(completion)
            finally:
                about = completion.kinflow
                event(
                    log,
                    logging.INFO,
                    "text generated",
                    id=completion.id,
                    tokens=completion.usage["completion_tokens"],
                    seconds=time.monotonic() - start_s,
                    degraded=about["degraded"],
                )

    # Answers

    def _whole(self, completion: Completion) -> None:
        text = "".join(completion.pieces(self._check_wanted))
        self._send(200, completion.whole(text))

    def _stream(self, completion: Completion, asked: Asked) -> None:
        """The first piece decides the status: what fails before it gets a proper one."""
        with closing(completion.pieces(self._check_wanted)) as pieces:
            first = next(pieces, "")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._streaming = True
            self._say(completion.chunk({"role": "assistant", "content": first}))
            for piece in pieces:
                self._say(completion.chunk({"content": piece}))
        self._say(completion.last_chunk())
        if asked.include_usage:
            self._say(completion.usage_chunk())
        self._say_raw(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _say(self, said: dict[str, Any]) -> None:
        self._say_raw(b"data: " + msgspec.json.encode(said) + b"\n\n")

    def _say_raw(self, data: bytes) -> None:
        """One chunk of the transfer."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(self, status: int, said: dict[str, Any], **headers: str) -> None:
        body = msgspec.json.encode(said)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, why: Refused) -> None:
        if self._streaming:
            # The status has left already: the client reads the error as an event, and no [DONE] follows.
            self.close_connection = True
            self._say(why.body)
            self.wfile.write(b"0\r\n\r\n")
            return
        headers = {"Retry_After": "1"} if why.status == 429 else {}
        if why.status == 401:
            headers["WWW_Authenticate"] = "Bearer"
        self._send(why.status, why.body, **headers)

    # What is looked at before

    def _read_body(self) -> bytes:
        """Raises Refused; the connection ends then, since nobody knows where the next request begins."""
        if self.command == "GET":
            return b""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise Refused(411, "a Content-Length is needed")
        size = int(length)
        if size > MAX_BODY_BYTES:
            self.close_connection = True
            left = min(size, MAX_DRAINED_BYTES)
            while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
                left -= len(piece)
            raise Refused(413, f"the body has {size} bytes, at most {MAX_BODY_BYTES} are read")
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the body ended early")
        return body

    def _check_client(self) -> None:
        """Raises Refused."""
        key = self._endpoint.key
        if key:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        # A web page of a stranger may send here: its body is no JSON, or its host is a name that it has pointed here.
        elif not _is_address(self.headers.get("Host", "")):
            raise Refused(403, "without an API key, the endpoint is asked by its address or as localhost")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.command == "POST" and kind != "application/json":
            raise Refused(415, f"the content type is {kind!r:.80}: application/json is needed")

    def _check_wanted(self) -> None:
        """Between two tokens. Raises ConnectionAbortedError, Refused."""
        if self._endpoint.stopping:
            raise Refused(503, "the server is being stopped", code="stopping")
        poll = select.poll()
        poll.register(self.connection, POLL_HUNG_UP)
        if poll.poll(0):
            raise ConnectionAbortedError("the client has closed the connection")

    def log_message(self, *_: Any) -> None:
        """Requests are logged as events."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server itself refuses, in the same shape."""
        self.close_connection = True
        self._send(int(code), Refused(int(code), message or "the request is malformed").body, Connection="close")


def _unknown_path(path: str) -> Refused:
    return Refused(404, f"{path[:100]!r} is not served here: /v1/chat/completions and /v1/models are")


def _is_address(host: str) -> bool:
    """host[:port] that no name server has a say in."""
    import ipaddress

    name = host.rpartition(":")[0] if ":" in host else host
    if is_loopback(name):
        return True
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True
