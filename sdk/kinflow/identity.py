"""Who somebody is under TLS: a role and a name, `device.cam-1`. It is the common name of a certificate.

The same text names the client in topics and requests, so that a broker's access list can compare them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from kinflow.errors import SettingsError
from kinflow.messages import Name

Role = Literal["device", "edge", "cloud"]
# Whom a broker's certificate may belong to, and who may answer requests.
SERVER_ROLES: tuple[Role, ...] = ("edge", "cloud")


@dataclass(frozen=True)
class Identity:
    """One holder of a certificate."""

    role: Role
    name: str

    @classmethod
    def parse(cls, text: str) -> Identity:
        """From "role.name". Raises SettingsError."""
        role, dot, name = text.partition(".")
        try:
            identity = cls(msgspec.convert(role, Role), msgspec.convert(name, Name))
            msgspec.convert(text, Name)
        except msgspec.ValidationError as exc:
            raise SettingsError(
                f"identity {text!r}: expected device.NAME, edge.NAME or cloud.NAME, 64 signs at most, "
                "letters, digits and . _ - in the name"
            ) from exc
        assert dot
        return identity

    @property
    def is_server(self) -> bool:
        return self.role in SERVER_ROLES

    def __str__(self) -> str:
        return f"{self.role}.{self.name}"
