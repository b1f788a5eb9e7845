"""`kinflow build`: a family's bundle from its recipe, or from a model and a folder of pictures."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from kinflow.errors import BackendError, SettingsError
from kinflow_builder.recipe import RECIPE, Recipe
from kinflow_builder.stitch_recipe import load as load_recipe
from kinflow_builder.text.recipe import is_text
from kinflow_builder.text.recipe import load as load_text

NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime", "scipy", "matplotlib", "PIL", "rich", "tomli_w")
NEEDED_FOR_TEXT = ("onnx", "onnxruntime", "scipy", "matplotlib", "rich", "gguf", "safetensors", "tokenizers", "jinja2")
NEEDED_FOR_TFLITE = ("litert_torch", "ai_edge_litert")


def build(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe.toml, or the folder of a family that has one.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Without a recipe: what returns your model.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            "--data",
            help="Folder with pictures, or texts; else where the recipe says.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder; else bundle/ beside the recipe.", show_default=False)
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(metavar="BLOCK[,BLOCK]", help="With --model: cut after these blocks.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="With --model: its input's size.", show_default=False),
    ] = None,
    minutes: Annotated[float, typer.Option(help="With --model: how long to train.", min=0.01)] = 15.0,
    seed: Annotated[int, typer.Option(help="With --model: of everything random.")] = 0,
    threads: Annotated[int, typer.Option(help="With --model: processor threads.", min=1)] = 2,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Instead of the recipe's training.epochs.", show_default=False)
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="A language model's branches, though the recipe has trained ones.")
    ] = False,
    keep_graphs: Annotated[
        bool,
        typer.Option("--keep-graphs", help="Train nothing: codecs, certificates and card anew, as the recipe is now."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Forget an interrupted build, or go on from it.")
    ] = False,
) -> None:
    """Make a family: align its members, train, quantise, certify, and write bundle and card.

    Either from a recipe, or from a model and a folder of pictures (<class>/*.jpg, or train/<class>/ and
    test/<class>/): then a recipe is made and kept beside the bundle. Safe to interrupt: the next call goes on after
    the last finished epoch. The log is train.log.
    """
    if recipe is not None and model is None and is_text(recipe):
        _text_family(recipe, images, out, train=train or fresh, fresh=fresh)
        return
    _check_installed(NEEDED, "builder")
    # Read when torch is imported. Threads that wait for each other spin for some milliseconds by default, which took
    # six times the processor time beside another process; without any spinning an epoch took a quarter longer.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if (recipe is None) == (model is None):
        raise SettingsError("name a recipe, or a model with --model FILE.py:FUNCTION --images FOLDER --out BUNDLE")
    if model is None:
        assert recipe is not None
        _from_recipe(recipe, images, out, epochs, fresh=fresh, keep_graphs=keep_graphs)
        return
    if images is None or out is None:
        raise SettingsError("--model needs --images, a folder of pictures, and --out, the bundle's folder")
    work = out.with_name(f"{out.name}.work")
    if keep_graphs:
        raise SettingsError(f"--keep-graphs needs the recipe that made the bundle: {work / RECIPE}, without --model")
    new = fresh or not (work / RECIPE).is_file()
    if new:
        _write_recipe(work, model, images, out.name, splits, size, minutes, seed, threads)
    _from_recipe(work, images, out, epochs, fresh=fresh, model=_absolute(model), checked=new)


def _text_family(path: Path, data: Path | None, out: Path | None, *, train: bool, fresh: bool) -> None:
    chosen = load_text(path)
    folder = path.parent if path.suffix == ".toml" else path
    _check_installed(NEEDED_FOR_TEXT, "builder-text")

    from kinflow_builder.log import BuildLog
    from kinflow_builder.text.build import TextBuild, build_text_family

    log = BuildLog(folder / "train.log")
    build_text_family(TextBuild(folder, out or folder / "bundle", chosen, log, data), train=train, fresh=fresh)


def _from_recipe(
    path: Path,
    images: Path | None,
    out: Path | None,
    epochs: int | None,
    *,
    fresh: bool,
    model: str = "",
    checked: bool = False,
    keep_graphs: bool = False,
) -> None:
    """`checked`: that every picture can be read is known already."""
    chosen = load_recipe(path)
    folder = path.parent if path.suffix == ".toml" else path
    if model and isinstance(chosen, Recipe) and chosen.network.make != model:
        raise SettingsError(f"{folder} is the work of another model, {chosen.network.make}: start anew with --fresh")
    if chosen.tflite_segments and not keep_graphs:
        # Now, and not after half an hour of training.
        _check_installed(NEEDED_FOR_TFLITE, "builder-tflite")
    if epochs is not None:
        chosen = msgspec.structs.replace(chosen, training=msgspec.structs.replace(chosen.training, epochs=epochs))

    from kinflow_builder import build as steps
    from kinflow_builder import data, readable
    from kinflow_builder.log import BuildLog

    found = data.load(chosen, folder, images)
    if not checked:
        readable.check(found)
    # What is made of a family lies in its folder; of another bundle, beside that.
    work = folder if out is None or model else out.with_name(f"{out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    log = BuildLog(work / "train.log")
    build = steps.Build(folder, out or folder / "bundle", work / "work", chosen, found, log)
    try:
        if keep_graphs:
            steps.rebuild(build)
        else:
            steps.build_family(build, fresh=fresh)
    except KeyboardInterrupt:
        log.console.print("interrupted: the same command goes on from here", markup=False)
        raise
    if out is None:
        steps.write_samples(folder / "samples", found.test, chosen)


def _write_recipe(
    work: Path,
    model: str,
    images: Path,
    name: str,
    splits: str | None,
    size: str | None,
    minutes: float,
    seed: int,
    threads: int,
) -> None:
    import tomli_w
    from rich.console import Console

    from kinflow_builder.own import Wishes, propose

    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", size) if size else None
    if size and sides is None:
        raise SettingsError(f"--size is {size!r}, expected HEIGHTxWIDTH such as 224x224")
    console = Console(stderr=True)
    tflite = all(find_spec(module) is not None for module in NEEDED_FOR_TFLITE)
    wishes = Wishes(
        make=_absolute(model),
        images=images,
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "family",
        size=(int(sides[1]), int(sides[2] or sides[1])) if sides else None,
        splits=splits.split(",") if splits else None,
        minutes=minutes,
        seed=seed,
        threads=threads,
        tflite=tflite,
    )
    made = propose(wishes, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    if not tflite:
        missing = "no TFLite graph will be made: pip install 'kinflow[builder-tflite]' brings the converter"
        console.print(missing, highlight=False, markup=False, soft_wrap=True)
    work.mkdir(parents=True, exist_ok=True)
    keys = {key: value for key, value in msgspec.to_builtins(made.recipe).items() if value is not None}
    (work / RECIPE).write_text(tomli_w.dumps(keys), encoding="utf-8")


def _absolute(model: str) -> str:
    file, colon, function = model.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise SettingsError(f"--model is {model!r}, expected FILE.py:FUNCTION")
    return f"{Path(file).resolve()}:{function}"


def _check_installed(modules: tuple[str, ...], extra: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BackendError(f"`kinflow build` needs {', '.join(missing)} here: pip install 'kinflow[{extra}]'")
