"""A real authority for tests, with certificates for those who ask."""

from __future__ import annotations

from pathlib import Path

from kinflow.authority import Authority
from kinflow.identity import Identity
from kinflow.settings import TlsSettings
from kinflow.tls import Credentials

PASSPHRASE = "not a secret, only a test"


class TestAuthority:
    """An authority in `folder`, and a folder for each identity beside it."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "pki", "test authority", PASSPHRASE)

    def tls(self, identity: str, **settings: str) -> TlsSettings:
        """Settings of a holder; its certificate is issued when it is asked for first."""
        out = self.folder / identity
        if not out.exists():
            self.authority.issue(Identity.parse(identity), out, PASSPHRASE, days=30)
        return TlsSettings(folder=str(out), **settings)

    def credentials(self, identity: str, **settings: str) -> Credentials:
        credentials = Credentials.load(self.tls(identity, **settings))
        assert credentials is not None
        return credentials

    def revoke(self, identity: str, *told: str) -> None:
        """Revoke, and bring the list to those who are `told`."""
        self.authority.revoke(Identity.parse(identity), PASSPHRASE)
        for holder in told:
            (self.folder / holder / "crl.pem").write_bytes((self.folder / "pki/crl.pem").read_bytes())
