"""`kinflow device`: the long-running runtime of a board with a camera."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from kinflow import settings
from kinflow.cli import flags
from kinflow.cli.bundles import choose_bundle
from kinflow.stopping import on_signals


def device(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="-, folder:PATH, watch:PATH, v4l2:DEVICE, stream:URL, picamera2:N or jetson:N.",
            show_default=False,
        ),
    ] = None,
    bundle: flags.Bundle = None,
    rate: Annotated[
        float | None, typer.Option(help="Frames looked at per second; 0: as many as it can.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="File that answers are added to; -: standard output.", show_default=False)
    ] = None,
    mqtt: Annotated[
        str | None, typer.Option(help="HOST:PORT of the broker that gets the answers.", show_default=False)
    ] = None,
    home_assistant: Annotated[
        bool, typer.Option("--home-assistant", help="Announce the device to Home Assistant on that broker.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The device's name.", show_default=False)] = None,
    broker: flags.Broker = None,
    local: Annotated[bool, typer.Option("--local", help="Never use the network for answers.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many answers.", show_default=False)] = None,
    settings_file: flags.SettingsFile = None,
) -> None:
    """Answer a camera's frames until stopped: always the newest, never a queue.

    Ends with status 0 on SIGTERM, Ctrl-C and at the end of a folder; with 2
    when the camera or the member fails, so that systemd starts it again.
    """
    from kinflow.board import BoardWatch
    from kinflow.device import Device
    from kinflow.family import Family
    from kinflow.runtime import sources
    from kinflow.runtime.notify import Notifier
    from kinflow.runtime.sampler import Sampler
    from kinflow.runtime.service import Service

    chosen = settings.load(
        "device",
        settings.DeviceSettings,
        settings_file,
        broker=broker,
        offload=False if local else None,
        service__source=source,
        service__bundle=None if bundle is None else str(bundle),
        service__rate_hz=rate,
        service__output=output,
        service__name=name,
        **_mqtt_flags(mqtt, home_assistant),
    )
    service = chosen.service
    family = Family.load(choose_bundle(Path(service.bundle) if service.bundle else None, None))
    stop = on_signals()
    with ExitStack() as stack:
        board = stack.enter_context(BoardWatch()) if service.board else None
        opened = stack.enter_context(Device(family, chosen, strain=board))
        label = service.name or socket.gethostname() or "kinflow"
        sinks = [stack.enter_context(sink) for sink in _sinks(service, label, board, family.labels)]
        notifier = stack.enter_context(Notifier(os.environ))
        sampler = stack.enter_context(Sampler(sources.parse(service.source, family.preprocess), service.rate_hz))
        runtime = Service(label, opened, sampler, sinks, board=board, notifier=notifier, stall_s=service.stall_s)
        with suppress(BrokenPipeError):  # whoever read the answers has gone
            runtime.run(stop, limit)


def _mqtt_flags(broker: str | None, home_assistant: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"broker": broker} if broker else {}
    if home_assistant:
        given["home_assistant"] = True
    return {f"service__mqtt__{key}": value for key, value in given.items()}


def _sinks(service: settings.ServiceSettings, label: str, board: Any, labels: list[str]) -> list[Any]:
    from kinflow.runtime.sinks import Lines, Mqtt

    sinks: list[Any] = []
    if service.output:
        sinks.append(Lines(None if service.output == "-" else Path(service.output)))
    if service.mqtt.broker:
        model = "unknown board" if board is None else board.state.model
        sinks.append(Mqtt(service.mqtt, label, model, labels))
    return sinks
