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
NEEDED_FOR_TFLITE = ("litert_torch", "ai_edge_litert")


def build(
    folder: Annotated[Path, typer.Argument(help="Folder of a family, with its recipe.toml.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the images; else where the recipe says, or a download.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Gets bundle/, samples/, train.log and work/; else FOLDER.", show_default=False),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's training.epochs.", show_default=False)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Forget an interrupted build, or go on from it.")
    ] = False,
) -> None:
    """Train a family from its recipe and write its bundle, card and samples.

    Safe to interrupt: the next call goes on after the last finished epoch. The log is train.log.
    """
    recipe = Recipe.load(folder)
    _check_installed(NEEDED, "builder")
    if recipe.tflite_segments:
        # Now, and not after half an hour of training.
        _check_installed(NEEDED_FOR_TFLITE, "builder-tflite")
    if epochs is not None:
        training = msgspec.structs.replace(recipe.training, epochs=epochs)
        recipe = msgspec.structs.replace(recipe, training=training)

    from kinflow_builder import build as steps
    from kinflow_builder import data as images
    from kinflow_builder.log import BuildLog

    found = images.load(recipe, data)
    out = out or folder
    steps.run(steps.Build(folder, out, recipe, found, BuildLog(out / "train.log")), fresh=fresh)


def _check_installed(modules: tuple[str, ...], extra: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BackendError(f"`kinflow build` needs {', '.join(missing)} here: pip install 'kinflow[{extra}]'")
