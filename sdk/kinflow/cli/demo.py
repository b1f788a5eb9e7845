"""`kinflow demo`: broker, cloud server, edge server and a device on loopback, classifying real images."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kinflow.answer import Answer
from kinflow.cli.summary import bytes_up, summarise, table
from kinflow.device import Device
from kinflow.errors import InputError, LinkError
from kinflow.fleet import LOOPBACK, Fleet
from kinflow.images import Item, sources
from kinflow.manifest import BackendName
from kinflow.settings import DeviceSettings

ROWS = 12
FIND_TIMEOUT_S = 15.0
COLOURS = {"device": "green", "edge": "yellow", "cloud": "magenta"}
# The repository's own families; a checkout is where the demo is run from.
FAMILY = Path("families/fashion")
SECOND_FAMILY = Path("families/imagenet_lite")
PHOTOS = Path("examples/photos")


def demo(
    family: Annotated[Path, typer.Option(help="Folder with bundle/ and samples/.")] = FAMILY,
    images: Annotated[int, typer.Option(help="How many sample images to classify.", min=1)] = 1000,
    backend: Annotated[str, typer.Option(help="Runtime of the device member: onnx or tflite.")] = "onnx",
    deadline: Annotated[float, typer.Option(help="Seconds in which each answer must come.", min=0.001)] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Run device, edge server, cloud server and brokers on this machine, on real images.

    In a checkout some photos come afterwards, by a second family on the same servers; they are not counted.
    """
    signal.signal(signal.SIGTERM, terminate)
    console = Console(stderr=as_json)
    bundle = family / "bundle"
    second = SECOND_FAMILY / "bundle"
    with_photos = not as_json and family == FAMILY and second.is_dir() and PHOTOS.is_dir()
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet([bundle, second] if with_photos else [bundle]))
        with console.status("starting the cloud server, the edge server and their brokers"):
            for server in fleet.start_cloud_and_edge():
                console.print(
                    f"{server.name} server: pid {server.pid}, {server.ready['broker_kind']} broker "
                    f"(pid {server.ready['broker_pid']}) at {server.broker}"
                )
        settings = DeviceSettings(
            backend=msgspec.convert(backend, BackendName), deadline_s=deadline, interfaces=[LOOPBACK]
        )
        device = stack.enter_context(Device.open(bundle, settings))
        with console.status("looking for an edge server by zeroconf"):
            if not device.wait_for_server(FIND_TIMEOUT_S):
                raise LinkError("zeroconf found no edge server on 127.0.0.1: does `kinflow doctor` report multicast?")
        items = list(sources([_samples(family)], device.family.preprocess))[:images]
        answers = _classify(device, items, fleet, console)
        summary = summarise(
            device.family, answers, [item.image for item in items], [int(item.truth or 0) for item in items]
        )
        if as_json:
            sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
        else:
            console.print(table(summary))
        if with_photos:
            other = stack.enter_context(Device.open(second, settings))
            other.wait_for_server(FIND_TIMEOUT_S)
            console.print(f"the same servers, another family: {other.family.manifest.title}")
            _classify(other, list(sources([str(PHOTOS)], other.family.preprocess)), fleet, console, keep=True)


def _classify(device: Device, items: list[Item], fleet: Fleet, console: Console, *, keep: bool = False) -> list[Answer]:
    """Every image through the device, shown as it comes; a server that dies is told and missed.

    `keep`: the last rows are also printed where there is no terminal to watch.
    """
    labels = device.family.labels
    answers: list[Answer] = []
    with _live(len(items), console, keep=keep) as show:
        for number, item in enumerate(items):
            answer = device.infer(item.image)
            answers.append(answer)
            truth = "" if item.truth is None else labels[item.truth]
            show(f"#{number}" if item.truth is not None else Path(item.name).name, answer, truth)
            for line in fleet.news():
                console.print(f"[bold red]{line}; the device goes on answering[/]")
    return answers


class _View:
    """The last rows and a progress bar."""

    def __init__(self, total: int, console: Console) -> None:
        self._rows: deque[tuple[str, ...]] = deque(maxlen=ROWS)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("classifying", total=total)

    def __call__(self, name: str, answer: Answer, truth: str) -> None:
        colour = COLOURS[answer.tier]
        mark = "" if not truth else "[green]✓[/]" if answer.label == truth else "[red]✗[/]"
        tier = answer.tier + (" (degraded)" if answer.degraded else "")
        self._rows.append(
            (
                name,
                f"{answer.label} {mark}",
                truth,
                f"{answer.confidence:.2f}",
                f"[{colour}]{tier}[/]",
                str(bytes_up(answer)),
                f"{answer.total_ms:.2f}",
            )
        )
        self._progress.advance(self._task)

    def __rich__(self) -> Group:
        rows = Table(expand=True)
        for column in ("image", "answer", "truth", "confidence", "tier", "bytes up", "ms"):
            rows.add_column(column, justify="right" if column in ("confidence", "bytes up", "ms") else "left")
        for row in self._rows:
            rows.add_row(*row)
        return Group(rows, self._progress)


@contextmanager
def _live(total: int, console: Console, *, keep: bool) -> Iterator[_View]:
    view = _View(total, console)
    with Live(view, console=console, refresh_per_second=8, transient=not (keep or console.is_terminal)):
        yield view


def terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack like Ctrl-C, so that every child is stopped."""
    raise SystemExit(143)


def _samples(family: Path) -> Path:
    """The idx file of sample images; its labels lie beside it."""
    found = sorted((family / "samples").glob("*images*idx3*"))
    if not found:
        raise InputError(f"{family / 'samples'} holds no idx file of images: name the folder of a family")
    return found[0]
