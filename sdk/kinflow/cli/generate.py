"""`kinflow generate`: one text, as it comes."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from kinflow.cli import flags, texts
from kinflow.errors import InputError

if TYPE_CHECKING:
    from kinflow.text.generation import Generation

MAX_PROMPT_BYTES = 1 << 20


def generate(
    prompt: Annotated[str, typer.Argument(help="What the user says; - reads it from standard input.")],
    system: Annotated[
        str | None, typer.Option(help="What the system says before it; the template's own without.", show_default=False)
    ] = None,
    bundle: flags.Bundle = None,
    family: texts.FamilyName = None,
    mode: texts.ModeName = None,
    max_tokens: texts.MaxTokens = None,
    temperature: texts.Temperature = 0.0,
    top_p: texts.TopP = 1.0,
    seed: texts.Seed = None,
    broker: flags.Broker = None,
    interface: flags.Interface = None,
    tls: flags.Tls = None,
    insecure_lan: flags.InsecureLan = None,
    wait: texts.Wait = flags.SERVER_WAIT_S,
    settings_file: flags.SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: text, tokens, summary.")] = False,
) -> None:
    """Write what the model answers to PROMPT: drafted here, verified by a server.

    The text goes to standard output, coloured by tier on a terminal, and what
    it cost to standard error.
    """
    said = _standard_input() if prompt == "-" else prompt
    chosen = texts.load_settings(
        settings_file,
        mode,
        broker,
        interface,
        tls,
        insecure_lan,
        offload=False if mode == "local" else None,
    )
    messages = [{"role": "user", "content": said}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    with texts.opened(bundle, family, chosen, wait) as device:
        generation = device.generate(messages, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if as_json:
            typer.echo(json.dumps(record(generation)))
        else:
            _show(generation)


def record(generation: Generation) -> dict[str, object]:
    """The whole text, every token, and the summary, as plain values."""
    tokens = list(generation)
    return {
        "text": "".join(token.text for token in tokens),
        "tokens": msgspec.to_builtins(tokens),
        "summary": msgspec.to_builtins(generation.summary),
    }


def _show(generation: Generation) -> None:
    from kinflow.cli.colours import console, piece, statistics

    out = console()
    with texts.stoppable() as stopped, closing(iter(generation)) as tokens:
        for token in tokens:
            out.print(piece(token), end="")
            if stopped():
                break
    out.print()
    console(sys.stderr).print(statistics(generation.summary))
    if stopped():
        raise KeyboardInterrupt


def _standard_input() -> str:
    """Raises InputError."""
    raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        raise InputError(f"standard input has more than {MAX_PROMPT_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise InputError(f"standard input is not UTF-8: {exc}") from exc
