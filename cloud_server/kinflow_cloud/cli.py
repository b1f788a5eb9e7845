"""`kinflow cloud`."""

from __future__ import annotations

from kinflow_edge import cli as shared


def cloud(
    bundles: shared.Bundles = None,
    settings_file: shared.SettingsFile = None,
    node: shared.NodeName = None,
    member: shared.Member = None,
    listen: shared.Listen = None,
    port: shared.Port = None,
    broker: shared.BrokerOption = None,
    broker_kind: shared.BrokerKind = None,
    threads: shared.Threads = None,
    batch_size: shared.BatchSize = None,
    batch_wait_ms: shared.BatchWait = None,
    advertise: shared.Advertise = None,
    http_port: shared.HttpPort = None,
    tls: shared.Tls = None,
    insecure_lan: shared.InsecureLan = None,
    as_json: shared.Json = False,
) -> None:
    """Serve a family's largest member: edge servers and devices send it what they are unsure of."""
    shared.serve(
        "cloud",
        settings_file,
        as_json,
        bundles=bundles or None,
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
