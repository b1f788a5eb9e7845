"""`kinflow bench`."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from kinflow.errors import BackendError
from kinflow_bench.timing import machine

app = typer.Typer(help="Measure what the project claims; each prints the figure under `ratio` and all beside it.")

FASHION = Path("families/fashion")
DIGITS = Path("families/digits_nested")
SMOLLM2 = Path("families/smollm2")
Family = Annotated[Path, typer.Argument(help="Folder of a family, or its bundle.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with test images: <class>/*.jpg, an idx pair, or files such as 007_name.jpg.", show_default=False
    ),
]
Rounds = Annotated[int, typer.Option(help="Interleaved rounds; medians are taken over them.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
BrokerKind = Annotated[str, typer.Option(help="mosquitto, embedded, or auto: mosquitto where installed.")]


@app.command()
def local(family: Family = FASHION, rounds: Rounds = 15, as_json: Json = False) -> None:
    """What infer() adds to an answer that stays on the device, over onnxruntime alone."""
    from kinflow_bench import local as bench

    _print(bench.run(_bundle(family), rounds), as_json)


@app.command()
def offload(rounds: Rounds = 300, broker_kind: BrokerKind = "auto", as_json: Json = False) -> None:
    """A whole offload, less coding and compute, over a bare TCP relay of the same bytes."""
    from kinflow_bench import offload as bench

    _print(bench.run(rounds, broker_kind), as_json)


@app.command()
def throughput(
    family: Family = FASHION,
    rounds: Rounds = 5,
    batch_size: Annotated[int, typer.Option(help="The server's batch_size.", min=1)] = 16,
    batch_wait_ms: Annotated[float, typer.Option(help="The server's batch_wait_ms.", min=0)] = 0.0,
    broker_kind: BrokerKind = "auto",
    as_json: Json = False,
) -> None:
    """Offloads per second of one server process, over the same graph in a bare loop at its best batch."""
    from kinflow_bench import throughput as bench

    _print(bench.run(_bundle(family), rounds, batch_size, batch_wait_ms, broker_kind), as_json)


@app.command()
def footprint(family: Family = FASHION, rounds: Rounds = 5, as_json: Json = False) -> None:
    """Disk, import time and memory of a device install, beside a bare onnxruntime script."""
    from kinflow_bench import footprint as bench

    _print(bench.run(_bundle(family), rounds), as_json)


@app.command()
def accuracy(
    family: Family = FASHION,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Every member on the test images, fed with the device's own coded features."""
    from kinflow_bench import accuracy as bench

    _print(bench.run(family, data), as_json)


@app.command()
def codec(
    family: Family = FASHION,
    data: Data = None,
    images: Annotated[int, typer.Option(help="So many of the test images; 0: all.", min=0)] = 2000,
    as_json: Json = False,
) -> None:
    """Bytes at equal accuracy (BD-rate): features against JPEG and WebP, all of them to the largest member."""
    _need("scipy", "certify")
    from kinflow_bench import codec as bench

    _print(bench.run(family, data, images or None), as_json)


@app.command()
def certificate(
    family: Family = FASHION,
    data: Data = None,
    splits: Annotated[int, typer.Option(help="Random calibration samples.", min=1)] = 200,
    epsilon: Annotated[
        float | None, typer.Option(help="Instead of each certificate's own.", min=1e-6, max=0.999, show_default=False)
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Instead of each certificate's own.", min=1e-6, max=0.999, show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """How often a certified threshold breaks its promise, over random calibration samples."""
    _need("scipy", "certify")
    from kinflow_bench import certificate as bench

    _print(bench.run(family, data, splits, epsilon, delta), as_json)


@app.command()
def nested(
    family: Annotated[Path, typer.Argument(help="Folder of a family with [nested] in its recipe.")] = DIGITS,
    data: Annotated[Path | None, typer.Option(help="Folder with the images.", show_default=False)] = None,
    folds: Annotated[int, typer.Option(help="Parts of all images; each is tested on once.", min=2)] = 5,
    only: Annotated[int | None, typer.Option(help="This fold alone, from 0.", min=0, show_default=False)] = None,
    jobs: Annotated[int, typer.Option(help="Folds at the same time.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Top-1 of every prefix member as served, less that of a model of its size trained alone."""
    _need("torch", "builder")
    from kinflow_bench import nested as bench

    _print(bench.run(family, data, folds, only, jobs), as_json)


def _need(module: str, extra: str) -> None:
    # Not in the extra `bench`, which every demo installs.
    if find_spec(module) is None:
        raise BackendError(f"this benchmark needs {module}: pip install 'kinflow[{extra}]'")


@app.command()
def chaos(
    family: Family = FASHION,
    faults: Annotated[int, typer.Option(help="How many faults, at least.", min=1)] = 50,
    inferences: Annotated[int, typer.Option(help="How many inferences, at least.", min=1)] = 20_000,
    devices: Annotated[int, typer.Option(help="How many devices.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Draws the order of the faults.")] = 0,
    short: Annotated[bool, typer.Option("--short", help="Nine faults in less than a minute, instead.")] = False,
    as_json: Json = False,
) -> None:
    """Kill, freeze, cut, slow down and restart everything under devices that ask without pause."""
    from kinflow_bench import chaos as bench

    plan = bench.SHORT if short else bench.full(faults, inferences, devices, seed)
    images = FASHION / "samples/images-idx3-ubyte.gz"
    figures = bench.run(_bundle(family), images, plan, lambda line: typer.echo(line, err=True))
    _print(figures, as_json)


@app.command()
def generate(
    family: Family = SMOLLM2,
    count: Annotated[int, typer.Option("--prompts", help="Texts compared token by token.", min=1)] = 200,
    tokens: Annotated[int, typer.Option(help="Length of each.", min=2)] = 128,
    timed: Annotated[int, typer.Option(help="So many of them are timed too.", min=0)] = 8,
    sampled: Annotated[int, typer.Option(help="So many of them are sampled from too.", min=0)] = 2,
    samples: Annotated[int, typer.Option(help="From each of them, in each mode.", min=20)] = 150,
    round_trips_ms: Annotated[list[float] | None, typer.Option("--round-trip", help="Links, ms.")] = None,
    parallel: Annotated[int, typer.Option(help="Texts compared side by side.", min=1, max=64)] = 4,
    data: Annotated[
        Path | None,
        typer.Option(help="File with a prompt per line, or JSON lines with `question`.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Keeps what is compared: the same command goes on from there.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the break-even.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Text generation: whether texts are what they promise to be, and their cost over shaped links."""
    from kinflow_bench import generate as bench
    from kinflow_bench.progress import progress

    extent = bench.Extent(count, tokens, timed, sampled, samples, round_trips_ms or (5, 20, 80), parallel)
    with progress("texts", extent.steps, quiet=as_json) as steps:
        figures = bench.run(_bundle(family), extent, data, state, plot, steps)
    _print(figures, as_json)


def _bundle(family: Path) -> Path:
    return family / "bundle" if (family / "bundle").is_dir() else family


def _print(figures: dict[str, Any], as_json: bool) -> None:
    figures["machine"] = machine()
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("figure", "value")
        for name, value in _flat("", figures):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        Console().print(table)


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [row for key, inner in value.items() for row in _flat(f"{prefix}.{key}" if prefix else key, inner)]
