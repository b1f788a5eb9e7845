"""`kinflow build`: a family's bundle from its recipe."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import msgspec
import typer

from kinflow.errors import BackendError
from kinflow_builder.recipe import Recipe

NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime", "scipy", "matplotlib", "PIL", "rich")


def build(
    folder: Path = typer.Argument(..., help="Folder of a family, with its recipe.toml."),
    data: Optional[Path] = typer.Option(None, help="Folder with the images; else where the recipe says, or a download."),  # noqa: UP007, UP045
    out: Optional[Path] = typer.Option(None, help="Where the bundle goes; else FOLDER/bundle."),  # noqa: UP007, UP045
    epochs: Optional[int] = typer.Option(None, min=1, help="Instead of the recipe's training.epochs."),  # noqa: UP007, UP045
    fresh: bool = typer.Option(
        False, "--fresh/--resume", help="Forget the checkpoint of an interrupted build, or go on from it."
    ),
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

    found = images.load(recipe.data, data, images.cache_folder(), recipe.training.seed)
    log = BuildLog(folder / "train.log")
    steps.run(steps.Build(folder, out or folder / "bundle", recipe, found, log), fresh=fresh)
