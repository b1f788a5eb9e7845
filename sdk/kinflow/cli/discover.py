"""`kinflow discover`: what is on this LAN."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from kinflow.advert import printable
from kinflow.discovery import Browser, Node
from kinflow.link import Link
from kinflow.messages import NodeStatus
from kinflow.mqtt import BrokerAddress
from kinflow.settings import TlsSettings
from kinflow.tls import Credentials

CONNECT_TIMEOUT_S = 1.5
STATUS_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class Found:
    """One server: its own status where its broker could be asked, otherwise what its advert says."""

    node: str
    tier: str
    address: str
    families: tuple[tuple[str, str], ...]
    software: str
    state: str
    """ready or offline, as it says itself; unreachable: no broker there; silent: no status at the broker."""
    load: float | None = None
    queue_ms: float | None = None
    advertised: bool = True
    insecure: bool = False
    """It says that it can be reached beyond loopback without TLS."""


def discover(
    timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds to listen for adverts.")] = 2.0,
    interface: Annotated[
        list[str] | None,
        typer.Option(
            help="IPv4 address whose network is searched; may be repeated. All without it.",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        str, typer.Option(help="Folder with this machine's certificate (kinflow pki issue).", show_default=False)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List the servers on this network: tier, families, load. Exit status 1 when there are none."""
    with Browser(interfaces=interface or ()) as browser:
        browser.check()
        time.sleep(timeout)
        nodes = browser.nodes()
    found = ask(nodes, Credentials.load(TlsSettings(folder=tls)))
    if as_json:
        typer.echo(json.dumps([asdict(server) for server in found]))
    elif found:
        _show(found)
    else:
        typer.echo(f"no server answered within {timeout:g} s; `kinflow doctor` checks this machine's side", err=True)
    if not found:
        raise typer.Exit(1)


def ask(nodes: Sequence[Node], tls: Credentials | None = None) -> list[Found]:
    """Read the retained statuses from every announced broker, all at the same time."""
    brokers = sorted({(node.host, node.port) for node in nodes})
    if not brokers:
        return []
    with ThreadPoolExecutor(min(len(brokers), 16)) as pool:
        answers = list(pool.map(lambda broker: _statuses(broker, nodes, tls), brokers))
    found: list[Found] = []
    for (host, port), statuses in zip(brokers, answers, strict=True):
        announced = {node.node: node for node in nodes if (node.host, node.port) == (host, port)}
        for name in sorted({*announced, *(statuses or {})}):
            status = None if statuses is None else statuses.get(name)
            found.append(_merge(f"{host}:{port}", announced.get(name), status, reachable=statuses is not None))
    return found


def _statuses(broker: tuple[str, int], nodes: Sequence[Node], tls: Credentials | None) -> dict[str, NodeStatus] | None:
    """None when the broker cannot be reached."""
    expected = {node.node for node in nodes if (node.host, node.port) == broker}
    with Link(BrokerAddress(*broker), f"discover-{os.urandom(6).hex()}", tls=tls) as link:
        if not link.wait_connected(CONNECT_TIMEOUT_S):
            return None
        give_up = time.monotonic() + STATUS_TIMEOUT_S
        while not expected <= link.nodes.keys() and time.monotonic() < give_up:
            time.sleep(0.01)
        return dict(link.nodes)


def _merge(address: str, node: Node | None, status: NodeStatus | None, *, reachable: bool) -> Found:
    if status is not None:
        families = tuple((served.family, served.version) for served in status.families)
        return Found(
            status.node,
            status.tier,
            address,
            families,
            printable(status.software),
            status.state,
            status.load,
            status.queue_ms,
            advertised=node is not None,
            insecure=status.insecure,
        )
    assert node is not None
    state = "silent" if reachable else "unreachable"
    return Found(node.node, node.tier, address, node.families, node.software, state)


def _show(found: Sequence[Found]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "node",
        "tier",
        "address",
        "families",
        "software",
        "load",
        "queue ms",
        "state",
        box=None,
        pad_edge=False,
    )
    styles = {"ready": "green", "offline": "red", "unreachable": "red", "silent": "yellow"}
    for server in found:
        table.add_row(
            server.node,
            server.tier,
            server.address,
            ", ".join(f"{family} {version}" for family, version in server.families),
            escape(server.software),
            "" if server.load is None else f"{server.load:.0%}",
            "" if server.queue_ms is None else f"{server.queue_ms:.1f}",
            f"[{styles[server.state]}]{server.state}[/]" + (" [yellow]no TLS[/]" if server.insecure else ""),
        )
    console = Console(highlight=False)
    # A pipe has no width: nothing may be cut there.
    console.print(table) if console.is_terminal else Console(highlight=False, width=200).print(table)
