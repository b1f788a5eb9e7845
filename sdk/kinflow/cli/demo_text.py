"""`kinflow demo-text`: a language model over two tiers, then over three, on loopback."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kinflow.cli.colours import legend, piece, statistics
from kinflow.cli.demo import terminate
from kinflow.errors import LinkError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.summary import Mode, Summary

FAMILY = Path("families/smollm2")
FIND_TIMEOUT_S = 15.0
PROMPTS = (
    "Why is the sky blue?",
    "Write two sentences about a small boat in a storm.",
    "Give me three tips for a good night's sleep.",
)
TWO_TIERS, THREE_TIERS = "device and edge", "device, edge and cloud"


class Reply(NamedTuple):
    """One text of the demo."""

    setting: str
    prompt: str
    text: str
    summary: Summary


def demo_text(
    family: Annotated[Path, typer.Option(help="Folder with bundle/.")] = FAMILY,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, tokens.")] = 64,
    mode: Annotated[Mode, typer.Option(help="Whose text it is.")] = "family",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Run device, edge server, cloud server and brokers on this machine, and have them write some replies.

    First an edge server verifies all by itself, then it holds the middle
    layers alone and asks the cloud server.
    """
    signal.signal(signal.SIGTERM, terminate)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    bundle = family / "bundle"
    console.print(legend())
    replies = _two_tiers(bundle, mode, max_tokens, console) + _three_tiers(bundle, mode, max_tokens, console)
    if as_json:
        typer.echo(json.dumps(summarise(mode, replies)))
    else:
        console.print(table(replies))


def _two_tiers(bundle: Path, mode: Mode, max_tokens: int, console: Console) -> list[Reply]:
    with Fleet([bundle]) as fleet:
        with console.status("starting an edge server with all upper layers, and its broker"):
            edge = fleet.start("edge", "--member", "cloud", "--no-advertise")
        _introduce(TWO_TIERS, [edge], console)
        return _replies(TWO_TIERS, bundle, DeviceSettings(broker=edge.broker), mode, max_tokens, fleet, console)


def _three_tiers(bundle: Path, mode: Mode, max_tokens: int, console: Console) -> list[Reply]:
    with Fleet([bundle]) as fleet:
        with console.status("starting the cloud server, the edge server and their brokers"):
            cloud, edge = fleet.start_cloud_and_edge("--no-advertise")
        _introduce(THREE_TIERS, [cloud, edge], console)
        return _replies(THREE_TIERS, bundle, DeviceSettings(broker=edge.broker), mode, max_tokens, fleet, console)


def _introduce(setting: str, servers: Sequence[ServerProcess], console: Console) -> None:
    console.print(Text(f"\n{setting}", "bold"))
    for server in servers:
        console.print(
            f"{server.name} server: pid {server.pid}, {server.ready['broker_kind']} broker "
            f"(pid {server.ready['broker_pid']}) at {server.broker}"
        )


def _replies(
    setting: str,
    bundle: Path,
    settings: DeviceSettings,
    mode: Mode,
    max_tokens: int,
    fleet: Fleet,
    console: Console,
) -> list[Reply]:
    """Each prompt's, shown as it comes; a server that dies is told and missed."""
    replies = []
    with TextDevice.open(bundle, settings) as device:
        if not device.wait_for_server(FIND_TIMEOUT_S):
            raise LinkError(f"the edge server at {settings.broker} did not say that it can verify")
        for prompt in PROMPTS:
            console.print(Text(f"\n> {prompt}", "bold"))
            generation = device.generate(prompt, max_tokens=max_tokens, mode=mode)
            text = ""
            for token in generation:
                console.print(piece(token), end="")
                text += token.text
                _tell(fleet, console)
            console.print()
            console.print(statistics(generation.summary))
            replies.append(Reply(setting, prompt, text, generation.summary))
    return replies


def _tell(fleet: Fleet, console: Console) -> None:
    for line in fleet.news():
        console.print(Text(f"\n{line}; the device goes on writing", "bold red"))


def summarise(mode: Mode, replies: Sequence[Reply]) -> dict[str, Any]:
    """Totals for each setting, and every reply."""
    return {
        "mode": mode,
        "settings": {setting: _totals(setting, replies) for setting in (TWO_TIERS, THREE_TIERS)},
        "replies": [
            {
                "setting": reply.setting,
                "prompt": reply.prompt,
                "text": reply.text,
                "summary": msgspec.to_builtins(reply.summary),
            }
            for reply in replies
        ],
    }


def _totals(setting: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """Of one setting; the ratios are None where nothing was asked or written."""
    summaries = [reply.summary for reply in replies if reply.setting == setting]
    count = sum(summary.count for summary in summaries)
    drafted = sum(summary.drafted for summary in summaries)
    seconds = sum(summary.seconds for summary in summaries)
    return {
        "tokens": {tier: sum(summary.tokens[tier] for summary in summaries) for tier in ("device", "edge", "cloud")},
        "unverified": sum(summary.unverified for summary in summaries),
        "acceptance": sum(summary.accepted for summary in summaries) / drafted if drafted else None,
        "passes_per_token": sum(summary.passes for summary in summaries) / count if count else None,
        "bytes_up_per_token": sum(summary.bytes_up for summary in summaries) / count if count else None,
        "tokens_per_s": count / seconds if seconds else None,
        "degraded": sum(summary.degraded for summary in summaries),
    }


def table(replies: Sequence[Reply]) -> Table:
    """A column per setting."""
    rows = Table(title=f"{len(replies)} replies", title_justify="left")
    rows.add_column("")
    columns = []
    for setting in (TWO_TIERS, THREE_TIERS):
        rows.add_column(setting, justify="right")
        totals = _totals(setting, replies)
        columns.append(
            {
                "tokens by the device": str(totals["tokens"]["device"]),
                "  of them not verified": str(totals["unverified"]),
                "by the edge": str(totals["tokens"]["edge"]),
                "by the cloud": str(totals["tokens"]["cloud"]),
                "drafts accepted": _number(totals["acceptance"], "{:.0%}"),
                "passes per token": _number(totals["passes_per_token"], "{:.2f}"),
                "bytes up per token": _number(totals["bytes_up_per_token"], "{:.0f}"),
                "tokens per second": _number(totals["tokens_per_s"], "{:.1f}"),
                "degraded replies": str(totals["degraded"]),
            }
        )
    for name in columns[0]:
        rows.add_row(name, *(column[name] for column in columns))
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
