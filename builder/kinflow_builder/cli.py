"""`kinflow build`: a family's bundle from its recipe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kinflow.errors import BackendError
from kinflow_builder.recipe import Recipe

NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime", "scipy", "matplotlib", "PIL", "rich")


def build(
    folder: Annotated[Path, typer.Argument(help="Folder of a family, with its recipe.toml.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the images; else where the recipe says, or a download.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the bundle goes; else FOLDER/bundle.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's training.epochs.", show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Forget an interrupted build, or go on from it.")
    ] = False,
) -> None:
    """Train a family from its recipe and write its bundle, card and samples.

    Safe to interrupt: the next call goes on after the last finished epoch. The log is FOLDER/train.log.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(f"`kinflow build` needs {', '.join(missing)}: pip install 'kinflow[builder]'")
    recipe = Recipe.load(folder)
    if epochs is not None:
        training = msgspec.structs.replace(recipe.training, epochs=epochs)
        recipe = msgspec.structs.replace(recipe, training=training)

    from kinflow_builder import build as steps
    from kinflow_builder import data as images
    from kinflow_builder.log import BuildLog

    found = images.load(recipe, data)
    log = BuildLog(folder / "train.log")
    steps.run(steps.Build(folder, out or folder / "bundle", recipe, found, log), fresh=fresh)
