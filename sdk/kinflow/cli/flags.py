"""Flags that several commands of a device have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SERVER_WAIT_S = 3.0

Bundle = Annotated[Path | None, typer.Option(help="Folder or .zip of a bundle.", show_default=False)]
Broker = Annotated[
    str | None, typer.Option(help="HOST:PORT of a server's broker; skips discovery.", show_default=False)
]
Interface = Annotated[
    list[str] | None,
    typer.Option(help="IPv4 address whose network is searched for servers; may be repeated.", show_default=False),
]
Tls = Annotated[
    str | None, typer.Option(help="Folder with this device's certificate (kinflow pki issue).", show_default=False)
]
InsecureLan = Annotated[
    bool | None,
    typer.Option("--insecure-lan", help="Ask servers beyond loopback without TLS.", show_default=False),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="TOML file; else ./kinflow-device.toml, ~/.config/kinflow/device.toml, "
        "/etc/kinflow/device.toml. A flag overrides its key.",
        show_default=False,
    ),
]
