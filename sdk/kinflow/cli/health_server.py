"""`kinflow health`: is a server of this machine ready? One line and an exit status, for shells and service managers."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kinflow import settings
from kinflow.address import BrokerAddress
from kinflow.errors import SettingsError

TIMEOUT_S = 5.0


def health(
    role: Annotated[Literal["edge", "cloud"], typer.Argument(help="Whose settings say where it answers.")] = "edge",
    at: Annotated[str | None, typer.Option("--at", help="HOST:PORT of its HTTP, instead.", show_default=False)] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option(
            "--settings",
            help="TOML file; else ./kinflow-ROLE.toml, ~/.config/kinflow/ROLE.toml, /etc/kinflow/ROLE.toml.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What the server said, as one JSON object.")] = False,
) -> None:
    """Ask a server whether a real inference succeeded lately. Exit status 0: ready; 1: not, or no answer."""
    address = _address(role, at, settings_file)
    said = _ask(address)
    if as_json:
        typer.echo(json.dumps(said))
    elif said["ready"]:
        typer.echo(f"{said['tier']} server {said['node']!r} is ready")
    else:
        typer.echo(f"not ready: {said['trouble'] or said['state']}")
    if not said["ready"]:
        raise typer.Exit(1)


def _address(role: str, at: str | None, settings_file: Path | None) -> BrokerAddress:
    if at is not None:
        return BrokerAddress.parse(at)
    chosen = settings.load(role, settings.ServerSettings, settings_file).http
    if not chosen.port:
        raise SettingsError(f"http.port of the role {role} is 0, any free one: set it, or say --at HOST:PORT")
    return BrokerAddress("127.0.0.1" if chosen.listen == "0.0.0.0" else chosen.listen, chosen.port)


def _ask(address: BrokerAddress) -> dict[str, object]:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        said = json.loads(connection.getresponse().read(4096))
        if not isinstance(said, dict) or not {"ready", "state", "node", "tier", "trouble"} <= said.keys():
            raise ValueError("it is no kinflow server")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        return {"ready": False, "state": "silent", "node": "", "tier": "", "trouble": f"nothing at {address}: {exc}"}
    else:
        return said
    finally:
        connection.close()
