"""Mutual TLS, 1.2 or newer: one folder with a certificate, and whom it trusts.

The folder holds ca.pem, cert.pem, key.pem and, where something was revoked, crl.pem: what `kinflow pki issue`
makes. Whoever is connected to must chain to ca.pem, be issued for servers (a device's certificate is not) and be
an edge or cloud server by name. Addresses are not compared: they change, and discovery is only a hint.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinflow.errors import SettingsError
from kinflow.identity import Identity
from kinflow.settings import TlsSettings

CA, CERT, KEY, CRL = "ca.pem", "cert.pem", "key.pem", "crl.pem"


@dataclass(frozen=True)
class Credentials:
    """One holder's certificate and key. `Credentials.load` is the way to make one."""

    folder: Path
    identity: Identity
    expires_s: float
    """time.time() at which the certificate ends."""
    server: str = ""
    """The only identity that a broker's certificate may have; empty: any server's."""

    @classmethod
    def load(cls, settings: TlsSettings) -> Credentials | None:
        """None when no folder is set. Raises SettingsError when the files do not make a valid certificate."""
        if not settings.folder:
            return None
        if settings.server and not Identity.parse(settings.server).is_server:
            raise SettingsError(f"tls.server is {settings.server!r}: expected edge.NAME or cloud.NAME")
        folder = Path(settings.folder)
        own = _own_certificate(folder)
        return cls(folder, _identity(own), ssl.cert_time_to_seconds(str(own["notAfter"])), settings.server)

    @property
    def days_left(self) -> float:
        return (self.expires_s - time.time()) / 86400

    def client_context(self) -> ssl.SSLContext:
        """Made anew for each connection: certificates and revocations may be replaced meanwhile."""
        context = _context(self.folder, ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return context

    def files(self) -> dict[str, Path]:
        """What there is of the folder's files, by name."""
        return {name: path for name in (CA, CERT, KEY, CRL) if (path := self.folder / name).exists()}

    def check_server(self, certificate: Any) -> None:
        """`certificate`: the verified one of the other side, from getpeercert(). Raises SettingsError."""
        identity = _identity(certificate)
        if not identity.is_server or self.server not in ("", str(identity)):
            raise SettingsError(f"the broker's certificate is {identity}'s, expected {self.server or 'a server'}'s")


def refuse_plain(settings: TlsSettings, host: str) -> str:
    """Why `host` may not be talked to; empty when it may: TLS, loopback, or plain traffic is allowed."""
    if settings.folder or settings.insecure_lan or is_loopback(host):
        return ""
    return f"{host} is beyond loopback and there is no TLS: set tls.folder (kinflow pki issue), or tls.insecure_lan"


def explain(error: ssl.SSLError) -> str:
    """What went wrong, without OpenSSL's line numbers."""
    return error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or str(error)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _context(folder: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    what = CA
    try:
        context.load_verify_locations(folder / CA)
        if (folder / CRL).exists():
            what = CRL
            context.load_verify_locations(folder / CRL)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        what = f"{CERT} and {KEY}"
        # A service has nobody to ask for a password: the empty one makes an encrypted key an error.
        context.load_cert_chain(folder / CERT, folder / KEY, password="")
    except OSError as exc:  # an SSLError is one
        raise SettingsError(f"tls.folder {folder}: {what}: {exc.strerror or exc}: see `kinflow pki issue`") from exc
    return context


def _identity(certificate: Any) -> Identity:
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return Identity.parse(names[0] if names else "")


def _own_certificate(folder: Path) -> dict[str, Any]:
    """The certificate in `folder`, decoded, once it was verified by a handshake with itself in memory.

    The ssl module decodes only what the other side of a connection has shown.
    """
    showing, accepting = _context(folder, ssl.PROTOCOL_TLS_CLIENT), _context(folder, ssl.PROTOCOL_TLS_SERVER)
    showing.check_hostname = False
    showing.verify_mode = ssl.CERT_NONE
    accepting.verify_mode = ssl.CERT_REQUIRED
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    shower, accepter = showing.wrap_bio(back, there), accepting.wrap_bio(there, back, server_side=True)
    try:
        while not (_shook_hands(shower) & _shook_hands(accepter)):
            pass
    except ssl.SSLError as exc:
        raise SettingsError(
            f"tls.folder {folder}: {CERT} is not valid here: {explain(exc)}. "
            "If this machine's clock is right, issue another"
        ) from exc
    return accepter.getpeercert() or {}


def _shook_hands(side: ssl.SSLObject) -> bool:
    """Go on with the handshake; whether this side has ended it."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
