"""Who may ask `kinflow serve`, and what is no request at all: keys, certificates, odd bytes."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest

from kinflow.api.endpoint import Endpoint
from kinflow.errors import SettingsError
from kinflow.fleet import LOOPBACK
from kinflow.settings import ServeSettings
from kinflow.text.device import TextDevice
from test_text_serve import HELLO, client, serving


@pytest.fixture(scope="module")
def url(tiny: Path) -> Iterator[str]:
    """Of one that needs no server."""
    with serving(tiny, "--mode", "local") as (_, url):
        yield url


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
