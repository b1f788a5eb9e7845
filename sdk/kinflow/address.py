"""Where a broker listens: "host", "host:port" or "[IPv6 address]:port"."""

from __future__ import annotations

from dataclasses import dataclass

from kinflow.errors import SettingsError


@dataclass(frozen=True)
class BrokerAddress:
    """Where a broker listens."""

    host: str
    port: int = 1883

    @classmethod
    def parse(cls, text: str, default_port: int = 1883) -> BrokerAddress:
        """From "host", "host:port" or "[IPv6 address]:port". Raises SettingsError."""
        wanted = f'broker {text!r}: expected "host", "host:port" or "[IPv6 address]:port"'
        host, colon, port = text.strip(), "", ""
        if host.startswith("["):
            host, bracket, rest = host[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise SettingsError(wanted)
            colon, port = rest[:1], rest[1:]
        elif host.count(":") > 1:
            raise SettingsError(f"{wanted}; an IPv6 address stands in brackets")
        else:
            host, colon, port = host.partition(":")
        if not host or any(sign.isspace() or sign in "/@" for sign in host):
            raise SettingsError(wanted)
        if not colon:
            return cls(host, default_port)
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise SettingsError(f"{wanted}; the port is a number from 1 to 65535")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_all(text: str) -> tuple[BrokerAddress, ...]:
    """From addresses with commas between them; empty text has none. Raises SettingsError."""
    return tuple(BrokerAddress.parse(part) for part in text.split(",")) if text.strip() else ()
