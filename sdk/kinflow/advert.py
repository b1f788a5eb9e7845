"""What an advert says, and which addresses it names. Pure but for listing this machine's addresses.

The TXT record has the keys `node`, `tier`, `families` ("fashion:1.0.0,other:2") and `software`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ifaddr
import msgspec

from kinflow.errors import DiscoveryError
from kinflow.messages import Name, Tier
from kinflow.ready import ready

MAX_TXT_BYTES = 255


@dataclass(frozen=True)
class Node:
    """One server as its advert describes it. Its retained status on the broker is what counts."""

    node: str
    tier: Tier
    host: str
    """IPv4 address of the broker. An Advert also takes a name, and 0.0.0.0 for all `advertised_addresses`."""
    port: int
    families: tuple[tuple[str, str], ...]
    """(family id, version)"""
    software: str = ""


def local_networks() -> dict[str, ipaddress.IPv4Network]:
    """The IPv4 addresses of this machine's interfaces, with their networks, loopback included."""
    found = {}
    for adapter in ifaddr.get_adapters():
        for address in adapter.ips:
            if isinstance(address.ip, str):
                interface = ipaddress.IPv4Interface(f"{address.ip}/{address.network_prefix}")
                found[address.ip] = interface.network
    return found


def advertised_addresses(interfaces: Sequence[str] = ()) -> tuple[str, ...]:
    """What a server that binds 0.0.0.0 announces: `interfaces`, or every address that others can reach.

    Loopback only where there is nothing else.
    """
    if interfaces:
        return tuple(interfaces)
    addresses = [ipaddress.IPv4Address(address) for address in local_networks()]
    outward = [address for address in addresses if not address.is_loopback]
    # Link-local addresses (169.254/16) come last: they are what an interface without DHCP gives itself.
    outward.sort(key=lambda address: (address.is_link_local, address))
    return tuple(str(address) for address in outward) or ("127.0.0.1",)


def nearest(announced: Sequence[str], used: Sequence[str]) -> str:
    """The announced address that shares a network with one of `used`, the first one where none does.

    Where all of `used` are loopback, only loopback will do: port 5353 is shared, so packets of other networks
    arrive when another process asked for them. Raises DiscoveryError when no announced address is usable.
    """
    networks = [network for own, network in local_networks().items() if own in used]
    candidates = [ipaddress.IPv4Address(address) for address in announced]
    if all(network.is_loopback for network in networks):
        candidates = [address for address in candidates if address.is_loopback]
    candidates = [address for address in candidates if _is_unicast(address)]
    if not candidates:
        raise DiscoveryError(f"no usable address among {list(announced)}")
    near = [address for address in candidates if any(address in network for network in networks)]
    return str((near or candidates)[0])


def printable(text: str) -> str:
    """Without control characters: what strangers send must not steer a terminal."""
    return "".join(character for character in text if character.isprintable())


def _is_unicast(address: ipaddress.IPv4Address) -> bool:
    return not (address.is_multicast or address.is_unspecified or address.is_reserved)


@ready
class _Txt(msgspec.Struct, frozen=True):
    """The TXT record, checked. Unknown keys are ignored."""

    node: Name
    tier: Tier
    families: str = ""
    software: str = ""


_Pair = tuple[Name, Name]


def write_advert(node: Node) -> dict[str, str]:
    """As many families as a TXT string holds: the retained status has them all. Raises DiscoveryError."""
    families = ",".join(f"{family}:{version}" for family, version in node.families)
    room = MAX_TXT_BYTES - len("families=")
    if len(families) > room:
        families = families[: families.rfind(",", 0, room + 1)]
    properties = {"node": node.node, "tier": node.tier, "families": families, "software": node.software[:32]}
    read_advert({key.encode(): value.encode() for key, value in properties.items()}, node.host, node.port)
    return properties


def read_advert(txt: Mapping[bytes, bytes | None], host: str, port: int | None) -> Node:
    """Raises DiscoveryError on anything but a whole, valid advert."""
    if not port or not 0 < port < 65536:
        raise DiscoveryError(f"port {port}")
    try:
        values = {key.decode(): (value or b"").decode() for key, value in txt.items()}
        checked = msgspec.convert(values, _Txt)
        pairs = [item.partition(":") for item in checked.families.split(",") if item]
        families = tuple(msgspec.convert((family, version), _Pair) for family, _, version in pairs)
    except (UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise DiscoveryError(str(exc)) from exc
    return Node(checked.node, checked.tier, host, port, families, printable(checked.software)[:32])
