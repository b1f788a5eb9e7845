"""`kinflow serve` as apps use it: a real process, a real server behind it, and OpenAI's own client."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from brokers import wait_until
from kinflow.api.endpoint import Endpoint
from kinflow.errors import SettingsError
from kinflow.fleet import LOOPBACK, Fleet, ServerProcess
from kinflow.settings import DeviceSettings, ServeSettings
from kinflow.text.device import TextDevice
from system_fixtures import Running, running

HELLO: Any = [{"role": "user", "content": "Is it late?"}]
# The tiny model's texts hardly ever end by themselves.
LONG = 470
# Sessions at a server that nobody asks: that of its own test.
IDLE = 1


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[ServerProcess]:
    """It has all layers."""
    with Fleet([tiny]) as fleet:
        yield fleet.start("edge", "--member", "cloud", "--no-advertise")


@contextmanager
def serving(tiny: Path, *options: str) -> Iterator[tuple[Running, str]]:
    """The process and its URL."""
    with running("serve", str(tiny), "--port", "0", "--json", *options) as run:
        yield run, str(run.ready()["url"])


def client(url: str, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def url(tiny: Path, server: ServerProcess) -> Iterator[str]:
    """Of an endpoint behind which the server verifies; two texts at a time."""
    options = ("--broker", server.broker, "--parallel", "2", "--model", "gpt-4o-mini")
    with serving(tiny, *options) as (_, url):
        yield url


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with client(url) as ai:
        yield ai


@pytest.fixture(scope="module")
def device(tiny: Path, server: ServerProcess) -> Iterator[TextDevice]:
    """What an app without the endpoint would use."""
    with TextDevice.open(tiny, DeviceSettings(broker=server.broker)) as device:
        assert device.wait_for_server(20)
        yield device


def sessions(server: ServerProcess) -> int:
    """How many generations the server holds."""
    said = urllib.request.urlopen(f"http://{server.ready['http']}/metrics").read().decode()
    found = re.search(r"^kinflow_sessions (\d+)\.0$", said, re.MULTILINE)
    assert found
    return int(found[1])


def test_models(ai: openai.OpenAI) -> None:
    """The family's own name and those it is given; another one is not found."""
    assert [model.id for model in ai.models.list()] == ["tiny", "gpt-4o-mini"]
    assert ai.models.retrieve("tiny").owned_by == "kinflow"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-5")


def test_a_whole_completion_is_the_devices_text(ai: openai.OpenAI, device: TextDevice) -> None:
    """Text, reason to end and usage; beside them who said how much, and how it was made."""
    expected = device.generate(HELLO, max_tokens=40)
    text = "".join(token.text for token in expected)
    made = ai.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=40, temperature=0)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "length")
    assert made.model == "tiny"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (expected.summary.prompt_tokens, 40)
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert sum(about["tokens"].values()) == 40
    assert about["tokens"]["edge"] > 0
    assert (about["mode"], about["degraded"], about["reason"]) == ("family", False, "")
    assert about["bytes_up"] > 0


def test_a_stream_is_the_same_text(ai: openai.OpenAI) -> None:
    """Sampled with one seed: first the role, then pieces, why it ended with what it cost, and the usage."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 40, "seed": 5, "top_p": 0.9}
    whole = ai.chat.completions.create(**asked)
    chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 10
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].kinflow["seed"] == whole.kinflow["seed"] == 5  # type: ignore[attr-defined]
    assert sum(chunks[-2].kinflow["tokens"].values()) == 40  # type: ignore[attr-defined]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_texts_at_the_same_time_do_not_mix(ai: openai.OpenAI) -> None:
    """Two questions at once get what each gets alone."""

    def ask(question: str) -> str | None:
        messages: Any = [{"role": "user", "content": question}]
        made = ai.chat.completions.create(model="tiny", messages=messages, max_tokens=80, temperature=0)
        return made.choices[0].message.content

    questions = ["Is it late?", "Name a bird."]
    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, questions)) == alone
    assert alone[0] != alone[1]


def test_a_mode_may_be_asked_for(ai: openai.OpenAI) -> None:
    """Per request: the device alone, which is not degraded when it is wanted."""
    made = ai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, extra_body={"kinflow": {"mode": "local"}}
    )
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert about["tokens"] == {"device": 5, "edge": 0, "cloud": 0}
    assert (about["mode"], about["degraded"]) == ("local", False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_before_it(ai: openai.OpenAI, server: ServerProcess, stream: bool) -> None:
    """Also one that two tokens make together; the session at the server ends with it."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0}
    text = ai.chat.completions.create(**asked).choices[0].message.content or ""
    stop = text[20:23]
    if stream:
        chunks = list(ai.chat.completions.create(**asked, stop=["never", stop], stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = ai.chat.completions.create(**asked, stop=["never", stop]).choices[0]
        said, finish = choice.message.content or "", choice.finish_reason
    assert said == text[: text.index(stop)]
    assert finish == "stop"
    wait_until(lambda: sessions(server) == IDLE)


def test_errors_are_openais_own(ai: openai.OpenAI) -> None:
    """The client raises the classes that apps know, with code and parameter."""
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO}
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(**{**asked, "model": "gpt-5"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        ai.chat.completions.create(**asked, n=3)
    assert (wrong.value.code, wrong.value.param, wrong.value.type) == (
        "unsupported_value",
        "n",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as long:
        ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 600}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="top_k"):
        ai.chat.completions.create(**asked, extra_body={"top_k": 5})


def begun(ai: openai.OpenAI) -> Any:
    """A long stream that has said something."""
    stream = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=LONG, stream=True)
    next(iter(stream))
    return stream


def test_too_many_at_once_are_told_to_come_back(ai: openai.OpenAI, server: ServerProcess) -> None:
    """Two are served at the same time, the third gets 429; whoever leaves makes room, and frees the session."""
    streams = [begun(ai), begun(ai)]
    with pytest.raises(openai.RateLimitError) as busy:
        ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    assert busy.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()

    def there_is_room() -> bool:
        try:
            return bool(ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices)
        except openai.RateLimitError:
            return False

    start_s = time.monotonic()
    wait_until(there_is_room)
    # A whole text of that length takes longer than a token.
    assert time.monotonic() - start_s < 10
    wait_until(lambda: sessions(server) == IDLE)


def test_a_client_that_leaves_ends_its_text(tiny: Path, server: ServerProcess) -> None:
    """One that waits for a whole completion and hangs up: the rest is not computed, the session is freed."""
    words = ("serve", str(tiny), "--port", "0", "--json", "--broker", server.broker)
    with running("--log-level", "info", *words) as run:
        url = str(run.ready()["url"])
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        # The sessions of texts before this one end when the server has heard of it.
        wait_until(lambda: sessions(server) == IDLE)
        asked = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": LONG})
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(asked)}\r\n\r\n{asked}".encode())
            wait_until(lambda: sessions(server) > IDLE)
        assert int(run.line(r"text generated .*tokens=(\d+)")[1]) < LONG
        wait_until(lambda: sessions(server) == IDLE)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(20) == 0
        assert "Traceback" not in "\n".join(run.err)


def test_without_a_server_the_text_is_degraded_and_says_so(tiny: Path) -> None:
    """A broker at which nobody serves: 200, the device's own text, and the reason."""
    with socket.create_server((LOOPBACK, 0)) as nobody:
        broker = f"{LOOPBACK}:{nobody.getsockname()[1]}"
        with serving(tiny, "--broker", broker, "--wait", "0") as (_, url), client(url) as ai:
            made = ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    about: dict[str, Any] = made.kinflow  # type: ignore[attr-defined]
    assert about["tokens"]["device"] == 5
    assert about["unverified"] == 5
    assert about["degraded"]
    assert about["reason"]


def test_an_endpoint_that_stops_tells_who_is_being_served(tiny: Path) -> None:
    """SIGTERM in mid-text: the stream ends with an error, not as if it were whole; the process ends with 0."""
    with serving(tiny, "--mode", "local") as (run, url), client(url) as ai:
        stream = begun(ai)
        run.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
        assert run.wait(20) == 0
        assert run.gone()


def test_a_key_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    """From a file; a wrong one and none at all are refused, for models too."""
    file = tmp_path / "key"
    file.write_text("sk-a-secret\n")
    with serving(tiny, "--mode", "local", "--key-file", str(file)) as (_, url):
        with client(url, "sk-a-secret") as ai:
            assert ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices
        with client(url, "sk-another") as ai, pytest.raises(openai.AuthenticationError) as wrong:
            ai.models.list()
        assert wrong.value.code == "invalid_api_key"


def raw(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, body) of a request as no client of OpenAI's would send it."""
    with closing(http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=20)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (404, ("GET", "/v2/models", None, {})),
        (404, ("POST", "/v1/completions", b"{}", {"Content_Type": "application/json"})),
        (400, ("POST", "/v1/chat/completions", b"{", {"Content_Type": "application/json"})),
        (403, ("GET", "/v1/models", None, {"Host": "evil.example:8080"})),
        (415, ("POST", "/v1/chat/completions", b"{}", {"Content_Type": "text/plain"})),
        (411, ("POST", "/v1/chat/completions", None, {"Content_Type": "application/json", "Content_Length": "x"})),
        (413, ("POST", "/v1/chat/completions", b" " * (2 << 20), {"Content_Type": "application/json"})),
        (501, ("DELETE", "/v1/models/tiny", None, {})),
    ],
)
def test_what_is_no_request_gets_its_status(url: str, status: int, request_: tuple[Any, ...]) -> None:
    """In OpenAI's shape, whatever is wrong with it; pages of strangers get nothing."""
    method, path, body, headers = request_
    got, said = raw(url, method, path, body, **headers)
    assert got == status
    assert set(said["error"]) == {"message", "type", "param", "code"}


def test_https(tiny: Path, tmp_path: Path) -> None:
    """With a certificate the same is answered under TLS, and nothing without it."""
    certificate, key = self_signed(tmp_path)
    options = ("--certificate", str(certificate), "--certificate-key", str(key), "--mode", "local")
    with serving(tiny, *options) as (_, url):
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        models = json.loads(urllib.request.urlopen(f"{url}/models", context=trust).read())
        assert [model["id"] for model in models["data"]] == ["tiny"]
        with pytest.raises(OSError):  # noqa: PT011  which one depends on the TLS library
            urllib.request.urlopen(f"{url.replace('https', 'http')}/models", timeout=5)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for the loopback address."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "endpoint")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(address, critical=False)
    (folder / "cert.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
    return folder / "cert.pem", folder / "key.pem"


def test_nothing_plain_leaves_loopback(tiny: Path, tmp_path: Path) -> None:
    """Beyond it a key and a certificate are needed, or leave to do without; bad files are named."""
    device = TextDevice.open(tiny)
    (tmp_path / "key").write_text("sk-a-secret")
    (tmp_path / "empty").write_text("\n")
    certificate, key = (str(path) for path in self_signed(tmp_path))
    secret = str(tmp_path / "key")
    for lacking in ({}, {"key_file": secret}, {"certificate": certificate, "certificate_key": key}):
        with pytest.raises(SettingsError, match="beyond loopback"):
            Endpoint(device, ServeSettings(listen="0.0.0.0", **lacking))
    Endpoint(device, ServeSettings(listen="0.0.0.0"), insecure_lan=True)
    Endpoint(device, ServeSettings(listen="0.0.0.0", key_file=secret, certificate=certificate, certificate_key=key))
    for wrong in ({"key_file": str(tmp_path / "empty")}, {"key_file": "/nowhere"}, {"certificate": "/nowhere"}):
        with pytest.raises(SettingsError, match=r"empty|nowhere"):
            Endpoint(device, ServeSettings(**wrong))


def test_a_port_that_is_taken_is_named(tiny: Path) -> None:
    """With the way out."""
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        endpoint = Endpoint(TextDevice.open(tiny), ServeSettings(port=taken.getsockname()[1]))
        with pytest.raises(SettingsError, match="--port"):
            stack.enter_context(endpoint)
