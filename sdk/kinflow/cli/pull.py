"""`kinflow pull`: a device takes its member of a family from a server."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kinflow import settings
from kinflow.address import BrokerAddress
from kinflow.cli import flags
from kinflow.discovery import Browser
from kinflow.errors import LinkLost, SettingsError
from kinflow.manifest import BackendName
from kinflow.messages import Tier
from kinflow.pull import Wanted
from kinflow.pull import pull as pull_bundle
from kinflow.signing import TrustedKeys
from kinflow.source import BundleSource
from kinflow.tls import Credentials, refuse_plain


def pull(
    family: Annotated[str, typer.Argument(help="Id of the family.")],
    destination: Annotated[Path, typer.Argument(help="Where the bundle is to be: a link that is swapped.")],
    broker: flags.Broker = None,
    tier: Annotated[Tier, typer.Option(help="Whose bundle: edge or cloud.")] = "edge",
    backend: Annotated[
        BackendName | None, typer.Option(help="Take the graphs for onnx or tflite.", show_default=False)
    ] = None,
    allow_rollback: Annotated[bool, typer.Option("--allow-rollback", help="Also take an older version.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to look for a server.")] = 5.0,
    tls: flags.Tls = None,
    insecure_lan: flags.InsecureLan = None,
    settings_file: flags.SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Take this device's member from a server: resumed, verified, tried out, then swapped in."""
    chosen = settings.load(
        "device",
        settings.DeviceSettings,
        settings_file,
        backend=backend,
        broker=broker,
        tls__folder=tls,
        tls__insecure_lan=insecure_lan,
    )
    address = BrokerAddress.parse(chosen.broker) if chosen.broker else _find(family, tier, chosen, wait)
    if why := refuse_plain(chosen.tls, address.host):
        raise SettingsError(why)
    wanted = Wanted(chosen.member, chosen.backend, TrustedKeys.parse(chosen.trusted_keys), allow_rollback)
    with BundleSource(address, tier, family, tls=Credentials.load(chosen.tls)) as source:
        pulled = pull_bundle(source, destination, wanted)
    if as_json:
        typer.echo(json.dumps(asdict(pulled)))
    elif pulled.replaced == pulled.version and not pulled.bytes_down:
        typer.echo(f"{pulled.family} {pulled.version} is there already")
    else:
        instead = f" instead of {pulled.replaced}" if pulled.replaced else ""
        typer.echo(f"{pulled.family} {pulled.version} is at {destination}{instead}: {pulled.bytes_down} bytes came")


def _find(family: str, tier: Tier, chosen: settings.DeviceSettings, wait_s: float) -> BrokerAddress:
    """The first announced server that may be asked."""
    until_s = time.monotonic() + wait_s
    refused = ""
    with Browser(interfaces=chosen.interfaces) as browser:
        browser.check()
        while time.monotonic() < until_s:
            for node in browser.nodes():
                if node.tier == tier and any(served == family for served, _ in node.families):
                    refused = refuse_plain(chosen.tls, node.host)
                    if not refused:
                        return BrokerAddress(node.host, node.port)
            time.sleep(0.05)
    raise LinkLost(refused or f"no {tier} server that serves {family} was announced within {wait_s:g} s: name --broker")
