"""Signatures of bundles: ed25519 (RFC 8032) over the bytes of family.json, which holds every file's hash.

family.sig stands beside family.json. Each line is one signature, `ed25519:<public key> <signature>` in hex, so that
a bundle may be signed by several keys while one replaces another. One of a trusted key is enough.

Needs cryptography (extra `pki`), which is imported only where there is something to sign or to check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kinflow.errors import BundleError, SettingsError

SIGNATURE = "family.sig"
MAX_SIGNATURE_BYTES = 16 * 1024
_KEY = re.compile(r"ed25519:([0-9a-f]{64})")
_LINE = re.compile(r"ed25519:([0-9a-f]{64}) ([0-9a-f]{128})")


@dataclass(frozen=True)
class TrustedKeys:
    """Public keys whose signature makes a bundle acceptable; none: every bundle is."""

    keys: frozenset[bytes] = frozenset()

    @classmethod
    def parse(cls, lines: Iterable[str]) -> TrustedKeys:
        """From "ed25519:" and 64 hex digits each. Raises SettingsError."""
        keys = set()
        for line in lines:
            match = _KEY.fullmatch(line.strip())
            if match is None:
                raise SettingsError(f"trusted key {line!r}: expected ed25519: and 64 hex digits, as kinflow sign shows")
            keys.add(bytes.fromhex(match[1]))
        return cls(frozenset(keys))

    def lines(self) -> list[str]:
        return sorted(f"ed25519:{key.hex()}" for key in self.keys)

    def check(self, manifest: bytes, signatures: bytes, name: str) -> str:
        """The trusted key that signed `manifest`; raises BundleError, which names the bundle, when none did."""
        signed_by = []
        for line in signatures.decode(errors="replace").splitlines():
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise BundleError(f"{name}/{SIGNATURE}: {line[:80]!r} is no signature: sign the bundle again")
            key = bytes.fromhex(match[1])
            if key in self.keys and _valid(key, bytes.fromhex(match[2]), manifest):
                return f"ed25519:{match[1]}"
            signed_by.append(f"ed25519:{match[1][:8]}…")
        found = f"it is signed by {', '.join(signed_by)}" if signed_by else "it is not signed"
        raise BundleError(f"{name} has no valid signature of a trusted key: {found}")


NO_KEYS = TrustedKeys()


class SigningKey:
    """A private key, kept encrypted in a file."""

    def __init__(self, private: bytes) -> None:
        """`private`: the 32 bytes of the key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._key = Ed25519PrivateKey.from_private_bytes(private)

    @classmethod
    def read(cls, file: Path, passphrase: str) -> SigningKey:
        """Raises SettingsError."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(file.read_bytes(), passphrase.encode())
        except (OSError, ValueError, TypeError) as exc:
            raise SettingsError(f"{file} cannot be opened: is the passphrase right? kinflow sign --new-key") from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise SettingsError(f"{file} is not an ed25519 key: make one with kinflow sign --new-key")
        return cls(key.private_bytes_raw())

    def pem(self, passphrase: str) -> bytes:
        """PKCS #8, encrypted."""
        from cryptography.hazmat.primitives import serialization

        encryption = serialization.BestAvailableEncryption(passphrase.encode())
        return self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    @property
    def public(self) -> str:
        """As it stands in `trusted_keys`."""
        return f"ed25519:{self._key.public_key().public_bytes_raw().hex()}"

    def sign(self, manifest: bytes) -> str:
        """A line for family.sig."""
        return f"{self.public} {self._key.sign(manifest).hex()}"


def _valid(key: bytes, signature: bytes, data: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as exc:
        raise SettingsError("trusted_keys are set, but cryptography is missing: pip install 'kinflow[pki]'") from exc
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
