"""How a command gets the passphrase of a key: from a file, or by asking."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kinflow.errors import SettingsError

MIN_SIGNS = 8

PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="First line: the passphrase. Asked for without it.", show_default=False),
]


def ask_passphrase(whose: str, file: Path | None, *, new: bool = False) -> str:
    """`new`: it is chosen now: asked for twice, and not too short. Raises SettingsError."""
    if file is None:
        given = str(typer.prompt(f"Passphrase of {whose}", hide_input=True, confirmation_prompt=new, err=True))
    else:
        try:
            given = file.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as exc:
            raise SettingsError(f"--passphrase-file {file}: {exc}") from exc
    if new and len(given) < MIN_SIGNS:
        raise SettingsError(f"the passphrase of {whose} has {len(given)} signs, at least {MIN_SIGNS} are needed")
    return given
