"""`kinflow edge`, and how both servers run from a command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kinflow import settings
from kinflow.cli.bundles import choose_bundle
from kinflow.messages import Tier
from kinflow.stopping import on_signals
from kinflow_edge.server import Server

Bundles = Annotated[
    list[str] | None,
    typer.Argument(help="Bundles to serve: folders or .zip files (families/fashion/bundle).", show_default=False),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="TOML file; else ./kinflow-ROLE.toml, ~/.config/kinflow/ROLE.toml, /etc/kinflow/ROLE.toml.",
    ),
]
NodeName = Annotated[str | None, typer.Option("--node", help="Name of this server on its network.")]
Member = Annotated[str | None, typer.Option(help="Member to run, if not the one named like the tier.")]
Listen = Annotated[str | None, typer.Option(help="IPv4 address that the started broker binds (127.0.0.1).")]
Port = Annotated[int | None, typer.Option(help="Port that the started broker binds (1883); 0: any free one.")]
BrokerOption = Annotated[str | None, typer.Option("--broker", help="host:port of a running broker to use instead.")]
BrokerKind = Annotated[str | None, typer.Option(help="What to start: mosquitto, embedded or auto.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime (1).")]
BatchSize = Annotated[int | None, typer.Option(help="Most requests computed as one batch (16).")]
BatchWait = Annotated[float | None, typer.Option("--batch-wait-ms", help="How long a batch waits to fill up (0).")]
Advertise = Annotated[bool | None, typer.Option("--advertise/--no-advertise", help="Announce by zeroconf (yes).")]
HttpPort = Annotated[int | None, typer.Option(help="Port of /live, /ready and /metrics on 127.0.0.1; 0: any free one.")]
Tls = Annotated[str | None, typer.Option(help="Folder with this server's certificate (kinflow pki issue).")]
InsecureLan = Annotated[
    bool | None, typer.Option("--insecure-lan", help="Serve beyond loopback without TLS.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print events as JSON lines on standard output.")]


def edge(
    bundles: Bundles = None,
    upstream: Annotated[str | None, typer.Option(help="host:port of the cloud server's broker.")] = None,
    settings_file: SettingsFile = None,
    node: NodeName = None,
    member: Member = None,
    listen: Listen = None,
    port: Port = None,
    broker: BrokerOption = None,
    broker_kind: BrokerKind = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    batch_wait_ms: BatchWait = None,
    advertise: Advertise = None,
    http_port: HttpPort = None,
    tls: Tls = None,
    insecure_lan: InsecureLan = None,
    as_json: Json = False,
) -> None:
    """Serve a family's edge member on this LAN: devices find it, and what it is unsure of goes upstream."""
    serve(
        "edge",
        settings_file,
        as_json,
        bundles=bundles or None,
        upstream=upstream,
        node=node,
        member=member,
        broker__listen=listen,
        broker__port=port,
        broker__address=broker,
        broker__kind=broker_kind,
        threads=threads,
        batch_size=batch_size,
        batch_wait_ms=batch_wait_ms,
        advertise=advertise,
        http__port=http_port,
        tls__folder=tls,
        tls__insecure_lan=insecure_lan,
    )


def serve(tier: Tier, settings_file: Path | None, as_json: bool, **flags: Any) -> None:
    """Run a server until SIGTERM or Ctrl-C. Raises KinflowError when it cannot start."""
    stop = on_signals()
    chosen = settings.load(tier, settings.ServerSettings, settings_file, **flags)
    if not chosen.bundles:
        chosen = msgspec.structs.replace(chosen, bundles=[str(choose_bundle(None, None))])
    with Server(tier, chosen) as server:
        _say(
            as_json,
            "ready",
            f"{tier} server {server.node!r} is ready: {server.broker.kind} broker at {server.broker.address}"
            + (f"; {server.insecure}" if server.insecure else ""),
            node=server.node,
            tier=tier,
            broker=str(server.broker.address),
            broker_kind=server.broker.kind,
            broker_pid=server.broker.pid,
            http=server.endpoints.address,
            upstream=chosen.upstream,
            tls=server.broker.credentials is not None,
            insecure=server.insecure,
            families=[f"{served.family} {served.version}" for served in server.workers.families],
        )
        broker = server.broker
        server.run(
            stop,
            lambda: _say(
                as_json,
                "broker-restarted",
                f"the {broker.kind} broker was started again at {broker.address}",
                node=server.node,
                broker=str(broker.address),
                broker_pid=broker.pid,
            ),
        )
        counts = dict(sorted(server.workers.counts.items()))
    _say(as_json, "stopped", f"{tier} server stopped: {counts or 'no requests'}", counts=counts)


def _say(as_json: bool, name: str, text: str, **fields: object) -> None:
    print(json.dumps({"event": name, **fields}) if as_json else text, file=sys.stdout, flush=True)
