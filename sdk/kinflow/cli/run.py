"""`kinflow run`: classify images, folders, idx files or raw frames, and show each answer as it comes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinflow import settings
from kinflow.cli import flags
from kinflow.cli.bundles import choose_bundle
from kinflow.errors import InputError
from kinflow.images import Item, sources

if TYPE_CHECKING:
    from kinflow.answer import Answer

COLUMNS = (
    ("image", 28),
    ("answer", 14),
    ("truth", 14),
    ("confidence", 10),
    ("tier", 7),
    ("up", 7),
    ("ms", 8),
)


def run(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH…", help="Images, folders of them, idx files, or - for frames on standard input."),
    ],
    bundle: flags.Bundle = None,
    family: Annotated[
        str | None,
        typer.Option(help="Look for the bundle in families/NAME/bundle (fashion).", show_default=False),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="onnx or tflite.", show_default=False)] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds in which each answer must come.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Keep answers at this confidence or above, 0 to 1.", show_default=False),
    ] = None,
    broker: flags.Broker = None,
    interface: flags.Interface = None,
    tls: flags.Tls = None,
    insecure_lan: flags.InsecureLan = None,
    local: Annotated[bool, typer.Option("--local", help="Never use the network.")] = False,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for a server before the first image.")
    ] = flags.SERVER_WAIT_S,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many images.", show_default=False)] = None,
    settings_file: flags.SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per image and line.")] = False,
) -> None:
    """Classify images here, asking a server where the device itself is not sure.

    An idx file (.gz too) with the file of its labels beside it also gives
    truth and accuracy. Frames on standard input are raw uint8, each exactly
    height*width*channels bytes of the family's input size, rows first,
    channels last, until the input ends; a truncated last frame is an error.
    """
    from kinflow.device import Device, load_family

    chosen = settings.load(
        "device",
        settings.DeviceSettings,
        settings_file,
        backend=backend,
        deadline_s=deadline,
        threshold=threshold,
        broker=broker,
        interfaces=interface or None,
        offload=False if local else None,
        tls__folder=tls,
        tls__insecure_lan=insecure_lan,
    )
    loaded = load_family(choose_bundle(bundle, family), chosen)
    items = islice(sources(paths, loaded.preprocess), limit)
    with Device(loaded, chosen) as device:
        if chosen.offload and wait > 0 and not device.wait_for_server(wait):
            typer.echo(f"no server found within {wait:g} s: answers stay on the device for now", err=True)
        if as_json:
            for item in items:
                answer = device.infer(item.image)
                typer.echo(json.dumps(_record(item, answer, loaded.labels)))
            return
        show_table(device, items, loaded.labels)


def show_table(device: Any, items: Any, labels: list[str]) -> None:
    """A line per image as it comes, and a summary, also when an image cannot be read or on Ctrl-C."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    summary = Summary()
    try:
        for item in items:
            truth = _truth(item, labels)
            answer = device.infer(item.image)
            summary.add(answer, truth)
            if summary.images == 1:
                console.print(Text(_line([name for name, _ in COLUMNS]), "bold"), soft_wrap=True)
            console.print(_row(item, answer, truth), soft_wrap=True)
    finally:
        if summary.images:
            # Another Console: one that was interrupted while printing would repeat what it still holds.
            Console(highlight=False).print(Text(summary.line(), "bold"), soft_wrap=True)


@dataclass
class Summary:
    """Counts what came."""

    images: int = 0
    degraded: int = 0
    known: int = 0
    right: int = 0
    bytes_up: int = 0
    tiers: Counter[str] = field(default_factory=Counter)
    total_ms: list[float] = field(default_factory=list)

    def add(self, answer: Answer, truth: str | None) -> None:
        self.images += 1
        self.degraded += answer.degraded
        self.known += truth is not None
        self.right += truth == answer.label
        self.bytes_up += answer.bytes_up
        self.tiers[answer.tier] += 1
        self.total_ms.append(answer.total_ms)

    def line(self) -> str:
        ordered = sorted(self.total_ms)
        tiers = [(tier, self.tiers[tier]) for tier in ("device", "edge", "cloud") if self.tiers[tier]]
        parts = [
            f"{self.images} image{'' if self.images == 1 else 's'}",
            ", ".join(f"{tier} {count / self.images:.1%}" for tier, count in tiers),
            f"accuracy {self.right / self.known:.2%} of {self.known}" if self.known else "",
            f"p50 {_percentile(ordered, 0.5):.1f} ms, p95 {_percentile(ordered, 0.95):.1f} ms",
            f"{self.bytes_up / self.images:.0f} bytes up per image",
            f"{self.degraded} degraded" if self.degraded else "",
        ]
        return " · ".join(part for part in parts if part)


def _percentile(ordered: list[float], share: float) -> float:
    """Nearest rank."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _truth(item: Item, labels: list[str]) -> str | None:
    if item.truth is None:
        return None
    if item.truth >= len(labels):
        raise InputError(f"{item.name} has the label {item.truth}, the family has {len(labels)} labels")
    return labels[item.truth]


def _record(item: Item, answer: Answer, labels: list[str]) -> dict[str, Any]:
    return {
        "image": item.name,
        "label": answer.label,
        "truth": _truth(item, labels),
        "confidence": round(answer.confidence, 6),
        "tier": answer.tier,
        "exit": answer.exit,
        "degraded": answer.degraded,
        "reason": answer.reason,
        "bytes_up": answer.bytes_up,
        "bytes_down": answer.bytes_down,
        "total_ms": round(answer.total_ms, 3),
        "request_id": answer.request_id,
    }


def _row(item: Item, answer: Answer, truth: str | None) -> Any:
    from rich.text import Text

    cells = (
        item.name,
        answer.label,
        truth or "",
        f"{answer.confidence:.3f}",
        answer.tier,
        str(answer.bytes_up),
        f"{answer.total_ms:.1f}",
    )
    row = Text(_line(cells))
    if truth is not None and truth != answer.label:
        row.stylize("red")
    if answer.degraded:
        row.append(f"  degraded: {answer.reason}", "yellow")
    return row


def _line(cells: Any) -> str:
    """Cut to the columns' widths; of a path the end is what tells files apart."""
    parts = []
    for position, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=True)):
        if len(cell) > width:
            cell = f"…{cell[1 - width :]}" if position == 0 else f"{cell[: width - 1]}…"
        parts.append(cell.rjust(width) if position in (3, 5, 6) else cell.ljust(width))
    return "  ".join(parts)
