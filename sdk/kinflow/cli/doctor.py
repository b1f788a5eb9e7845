"""`kinflow doctor`: is this machine fit for its role? Each line says what was found and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kinflow import settings
from kinflow.cli import flags, health_board, health_inference, health_machine, health_network
from kinflow.cli.health import Check, guarded

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle for the real inference (families/fashion/bundle).", show_default=False),
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the broker to check; skips discovery.", show_default=False),
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option(
            help="IPv4 address whose network is checked; may be repeated. All without it.", show_default=False
        ),
    ] = None,
    tls: flags.Tls = None,
    settings_file: flags.SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check this machine; each line says what to do. Exit status 1 when something fails."""
    chosen = settings.load(
        "device", settings.DeviceSettings, settings_file, broker=broker, interfaces=interface or None, tls__folder=tls
    )
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", health_machine.python),
        ("memory", health_machine.memory),
        ("disk", health_machine.disk),
        ("clock", health_machine.clock),
        ("cpu", health_machine.processor),
        ("glibc", health_board.glibc),
        ("board", health_board.board),
        ("jetpack", health_board.jetpack),
        ("camera", partial(health_board.camera, chosen.service.source)),
        ("packages", health_machine.packages),
        ("interfaces", partial(health_network.interfaces, chosen.interfaces)),
        ("multicast", partial(health_network.multicast, chosen.interfaces)),
        ("certificate", partial(health_network.certificate, chosen.tls)),
        ("broker", partial(health_network.broker, chosen.broker, chosen.tls)),
        ("inference", partial(health_inference.local, bundle, chosen)),
        ("offload", partial(health_inference.offloaded, bundle, chosen)),
    ]
    checks: list[Check] = []
    for name, step in steps:
        for check in guarded(name, step):
            checks.append(check)
            if not as_json:
                _show(check)
    failed = sum(check.status == "fail" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}))
    else:
        warned = sum(check.status == "warn" for check in checks)
        typer.echo(f"{len(checks)} checks: {failed} failed, {warned} to look at")
    if failed:
        raise typer.Exit(1)


def _show(check: Check) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{check.status:<5}", STYLES[check.status]), (f"{check.name:<12}", "bold"), check.found)
    if check.advice:
        line.append(f" -> {check.advice}", "cyan")
    Console(highlight=False).print(line, soft_wrap=True)
