"""`kinflow serve`: an OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kinflow.cli import flags, texts
from kinflow.stopping import on_signals


def serve(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder or .zip of a bundle (families/smollm2/bundle).", show_default=False)
    ] = None,
    listen: Annotated[str | None, typer.Option(help="IPv4 address to bind (127.0.0.1).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind (8080); 0: any free one.", show_default=False)] = None,
    key_file: Annotated[
        str | None, typer.Option(help="File with the API key that clients must send.", show_default=False)
    ] = None,
    certificate: Annotated[
        str | None, typer.Option(help="PEM file with the certificate chain for https.", show_default=False)
    ] = None,
    certificate_key: Annotated[
        str | None, typer.Option(help="PEM file with its private key.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Another model's name that is answered too; may be repeated.", show_default=False),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="Texts at the same time (4); above it the answer is 429.", show_default=False)
    ] = None,
    mode: texts.ModeName = None,
    max_tokens: texts.MaxTokens = None,
    broker: flags.Broker = None,
    interface: flags.Interface = None,
    tls: flags.Tls = None,
    insecure_lan: Annotated[
        bool | None,
        typer.Option("--insecure-lan", help="Allow connections beyond loopback without TLS.", show_default=False),
    ] = None,
    wait: texts.Wait = flags.SERVER_WAIT_S,
    settings_file: flags.SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on standard output.")] = False,
) -> None:
    """Answer /v1/chat/completions and /v1/models until stopped: existing apps change their URL.

    On an edge server's machine, --broker names its own broker.
    """
    from kinflow.api.endpoint import Endpoint

    chosen = texts.load_settings(
        settings_file,
        mode,
        broker,
        interface,
        tls,
        insecure_lan,
        serve__bundle=None if bundle is None else str(bundle),
        serve__listen=listen,
        serve__port=port,
        serve__key_file=key_file,
        serve__certificate=certificate,
        serve__certificate_key=certificate_key,
        serve__models=model or None,
        serve__parallel=parallel,
        text__max_tokens=max_tokens,
    )
    stop = on_signals()
    named = Path(chosen.serve.bundle) if chosen.serve.bundle else None
    with (
        texts.opened(named, None, chosen, wait) as device,
        Endpoint(device, chosen.serve, insecure_lan=chosen.tls.insecure_lan) as endpoint,
    ):
        names = list(endpoint.models)
        if as_json:
            typer.echo(json.dumps({"event": "ready", "url": endpoint.address, "models": names}))
        else:
            typer.echo(f"{', '.join(names)} at {endpoint.address}, mode {chosen.text.mode}; Ctrl-C ends it")
        stop.wait()
