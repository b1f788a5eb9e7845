"""Puts the commands together: kinflow's own, and those that the entry-point group `kinflow.commands` adds.

A command's module is imported when the command is used or listed, so that one whose extra is not installed
does not stand in the way of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from typer.core import TyperGroup

from kinflow import logs
from kinflow.errors import KinflowError, SettingsError

ENTRY_POINTS = "kinflow.commands"
OWN = {
    "demo": "kinflow.cli.demo:demo",
    "demo-text": "kinflow.cli.demo_text:demo_text",
    "run": "kinflow.cli.run:run",
    "device": "kinflow.cli.device:device",
    "chat": "kinflow.cli.chat:chat",
    "generate": "kinflow.cli.generate:generate",
    "serve": "kinflow.cli.serve:serve",
    "tune": "kinflow.cli.tune:tune",
    "discover": "kinflow.cli.discover:discover",
    "inspect": "kinflow.cli.inspect:inspect",
    "doctor": "kinflow.cli.doctor:doctor",
    "health": "kinflow.cli.health_server:health",
    "pki": "kinflow.cli.pki:app",
    "sign": "kinflow.cli.sign:sign",
    "verify": "kinflow.cli.sign:verify",
    "pull": "kinflow.cli.pull:pull",
}
# The extra that brings what a command of this project imports.
EXTRAS = {
    "edge": "edge",
    "cloud": "cloud",
    "build": "builder",
    "certify": "certify",
    "bench": "bench",
    "demo": "edge",
    "demo-text": "edge",
    "pki": "pki",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class CommandGroup(TyperGroup):
    """Finds commands when they are asked for, and turns errors into one line and an exit status."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return [*OWN, *sorted(_added().keys() - OWN.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name in OWN:
            return _command(cmd_name, lambda: _attribute(OWN[cmd_name]))
        entry = _added().get(cmd_name)
        return None if entry is None else _command(cmd_name, entry.load)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KinflowError as exc:
            _fail(str(exc))
        except ModuleNotFoundError as exc:
            _fail(_missing(str(ctx.invoked_subcommand), exc))
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A small device uses a big model's judgement only when it needs it.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from kinflow import __version__

        typer.echo(f"kinflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    log_level: Annotated[
        str, typer.Option(help=f"What is logged to standard error: {', '.join(logs.LEVELS)}.")
    ] = "warning",
    log_format: Annotated[str, typer.Option(help="text (key=value) or json: one line per event.")] = "text",
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end."),
    ] = False,
) -> None:
    if log_level not in logs.LEVELS:
        raise SettingsError(f"--log-level is {log_level!r}, expected {', '.join(logs.LEVELS)}")
    formats: dict[str, Literal["text", "json"]] = {"text": "text", "json": "json"}
    if log_format not in formats:
        raise SettingsError(f"--log-format is {log_format!r}, expected text or json")
    logs.setup(log_level, formats[log_format])


def _added() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _command(name: str, load: Callable[[], Any]) -> Any:
    """A click command from a function or a typer application; a stand-in where it cannot be loaded."""
    try:
        loaded = load()
    except ModuleNotFoundError as exc:
        loaded = _stand_in(_missing(name, exc))
    except Exception as exc:  # somebody else's package must not take the other commands down
        loaded = _stand_in(f"the command {name!r} cannot be loaded: {type(exc).__name__}: {exc}")
    if not isinstance(loaded, typer.Typer):
        function, loaded = loaded, typer.Typer(add_completion=False)
        loaded.command(name, context_settings=getattr(function, "context_settings", None))(function)
    loaded.pretty_exceptions_enable = False
    command = typer.main.get_command(loaded)
    command.name = name
    return command


def _stand_in(problem: str) -> Callable[..., None]:
    def unavailable(context: typer.Context) -> None:  # noqa: ARG001
        _fail(problem)

    unavailable.__doc__ = f"Not available: {escape(problem)}"
    unavailable.context_settings = {  # type: ignore[attr-defined]
        "ignore_unknown_options": True,
        "allow_extra_args": True,
    }
    return unavailable


def _missing(name: str, error: ModuleNotFoundError) -> str:
    if name in EXTRAS:
        return f"kinflow {name} needs {error.name}: pip install 'kinflow[{EXTRAS[name]}]'"
    return f"kinflow {name} needs the module {error.name}, which is not installed"


def _fail(problem: str) -> None:
    typer.echo(f"error: {problem}", err=True)
    raise typer.Exit(EXIT_ERROR)
