"""The family and the labelled images that a benchmark of accuracy works on."""

from __future__ import annotations

from pathlib import Path

from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow_builder import data as recipe_data
from kinflow_builder import folders
from kinflow_builder.folders import Pictures
from kinflow_builder.recipe import RECIPE


def load(folder: Path, directory: Path | None) -> tuple[Family, Pictures]:
    """A family's folder or a bundle, and the test images: those in `directory`, else those of the family's recipe.

    Raises BundleError, InputError, and SettingsError where neither is given.
    """
    family = Family.load(folder / "bundle" if (folder / "bundle").is_dir() else folder)
    if directory is not None:
        return family, folders.find(directory, family.labels)
    if not (folder / RECIPE).is_file():
        raise SettingsError(f"{folder} has no {RECIPE} that names test images: give a folder of them with --data")
    return family, recipe_data.load_test(folder)
