"""`kinflow tune`: measure the runtimes of this board once, and remember the fastest that gives the same answers."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kinflow import settings
from kinflow.cli.bundles import choose_bundle


def tune(
    bundle: Annotated[
        Path | None, typer.Argument(help="Folder or .zip of a bundle (families/fashion/bundle).", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; name it as `tuned` in the device's settings.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.05, max=600, help="How long each way is measured.")] = 2.0,
    images: Annotated[int, typer.Option(min=1, max=1000, help="Inputs on which the answers must be the same.")] = 8,
    engine_cache: Annotated[str, typer.Option(help="Folder for TensorRT's engines.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Try each backend, accelerator and number of threads with the device member.

    Without --out nothing is written. Ways that give other answers, that do
    not run, or that heat the board until it slows down are not chosen.
    """
    from kinflow import tuning
    from kinflow.board import judge, read_state
    from kinflow.family import Family

    family = Family.load(choose_bundle(bundle, None))
    board = read_state()

    def slowed_down() -> str:
        # Load is what measuring makes itself; heat is what will be there in service too.
        state = read_state()
        hot = state.temperature_c is not None and state.temperature_c >= state.limit_c
        return judge(state).reason if hot or (state.throttled is not None and state.throttled.now) else ""

    member = settings.DeviceSettings().member
    cores = len(os.sched_getaffinity(0))
    shape = family.preprocess
    made_up = tuning.made_up_images((len(shape.mean), shape.height, shape.width), images)
    candidates = tuning.ways(family, member, cores, tuning.present_accelerators())
    trials = []
    for trial in tuning.try_all(
        family, member, candidates, made_up, seconds=seconds, engine_cache=engine_cache, slowed_down=slowed_down
    ):
        trials.append(trial)
        if not as_json:
            typer.echo(f"{trial.way!s:<24}  {trial.run_ms:8.2f} ms  {trial.problem}".rstrip())
    best = tuning.choose(trials).way
    if out is not None:
        found = settings.Tuned(
            backend=best.backend,
            accelerator=best.accelerator,
            threads=best.threads,
            family=f"{family.id} {family.version}",
            board=board.model,
        )
        settings.write_tuned(out, found)
    if as_json:
        typer.echo(json.dumps({"chosen": asdict(best), "trials": [_record(trial) for trial in trials]}))
    else:
        typer.echo(f"chosen: {best}" + ("" if out is None else f", written to {out}"))


def _record(trial: Any) -> dict[str, Any]:
    record = asdict(trial)
    return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in record.items()}
