"""`kinflow certify`: new certificates for a bundle, from one's own pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinflow.errors import SettingsError

if TYPE_CHECKING:
    from kinflow_builder.certify import Report, State
    from kinflow_builder.service import Cascade


def certify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")],
    data: Annotated[
        Path,
        typer.Option(help="Pictures: <class>/*.jpg, test/<class>/*.jpg, an idx pair, or files such as 007_name.jpg."),
    ],
    epsilon: Annotated[float, typer.Option(help="What the risk of each exit is bounded by: 0.01 is one percent.")],
    delta: Annotated[float, typer.Option(help="Probability that the bound does not hold.")] = 0.05,
    exit: Annotated[
        str | None, typer.Option(help="Only this exit; else all but the last one.", show_default=False)
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Any pictures: an answer is a loss where the largest member differs.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write this bundle, and leave BUNDLE as it is.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Give a bundle's exits new thresholds, certified for your own pictures. Nothing is trained.

    With labels the risk is the gap: the share of all pictures whose answer is kept, wrong, and right at the last exit.
    """
    for name, value in (("--epsilon", epsilon), ("--delta", delta)):
        if not 0 < value < 1:
            raise SettingsError(f"{name} is {value}, expected a number between 0 and 1, such as 0.01")

    from kinflow_builder.certify import certify_bundle
    from kinflow_builder.recipe import Exit as Promise

    report = certify_bundle(bundle, data, Promise(epsilon, delta), only=exit, labelled=not unlabelled, out=out)
    written = out or bundle
    if as_json:
        typer.echo(json.dumps({"bundle": str(written), "epsilon": epsilon, "delta": delta, **asdict(report)}))
    else:
        _show(report, epsilon, delta, written)


def _show(report: Report, epsilon: float, delta: float, written: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(
        f"{report.images} pictures (sha256 {report.data_sha256[:12]}…), of which {report.certified_with} certify: "
        f"{report.risk} <= {epsilon:g} with probability {1 - delta:g} at each exit",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("exit", "", "temperature", "threshold", "keeps", report.risk):
        table.add_column(column, justify="left" if column in ("exit", "") else "right")
    for name in report.before:
        table.add_row(name, "before", *_cells(report.before[name]))
        table.add_row("", "now", *_cells(report.after[name]))
    console.print(table)
    right = "right" if report.risk == "gap" else "as the largest member says"
    for when, service in (("before", report.service_before), ("now", report.service_after)):
        console.print(f"in service {when}: {_service(service)}, {service.top1:.2%} {right}", soft_wrap=True)
    console.print(f"written: {written}", soft_wrap=True, markup=False)


def _cells(state: State) -> tuple[str, ...]:
    return (f"{state.temperature:.3f}", f"{state.threshold:.3f}", f"{state.kept_share:.1%}", f"{state.risk:.3%}")


def _service(service: Cascade) -> str:
    shares = [f"{name} answers {share:.1%}" for name, share in service.shares.items()]
    return ", ".join([*shares, f"{service.bytes_mean:.0f} bytes sent per picture"])
