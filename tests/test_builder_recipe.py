"""Recipes: what is read, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow_builder.recipe import Recipe

FASHION = Path(__file__).parents[1] / "families" / "fashion"


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the fashion recipe with one text replaced."""
    text = (FASHION / "recipe.toml").read_text()
    assert old in text
    (tmp_path / "recipe.toml").write_text(text.replace(old, new, 1))
    return tmp_path


def test_committed_recipe() -> None:
    """The committed recipe is read, and the committed bundle says the same of itself."""
    recipe = Recipe.load(FASHION)
    manifest = Family.load(FASHION / "bundle").manifest
    assert (recipe.id, recipe.version, recipe.labels) == (manifest.id, manifest.version, manifest.labels)
    assert recipe.preprocess == manifest.preprocess
    assert recipe.members == {name: member.segments for name, member in manifest.members.items()}
    (split,), (coding,) = manifest.splits.values(), recipe.coding.values()
    assert split.default_codec == f"s1-q4x{coding.default:g}"
    promised = {name: (exit.epsilon, exit.delta) for name, exit in recipe.exits.items()}
    certified = {name: exit.certificate for name, exit in manifest.exits.items()}
    assert promised == {name: (made.epsilon, made.delta) for name, made in certified.items() if made is not None}


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("epochs =", "epoch =", "epoch"),
        ("momentum = 0.9", "momentum = 1.5", "$.training.momentum"),
        ('mode = "L"', 'mode = "CMYK"', "$.preprocess.mode"),
        ('sha256 = "', 'sha256 = "x', "$.data.train_images.sha256"),
        ("[exits.device]\nepsilon = ", "[exits.device]\nepsilon = 1", "$.exits"),
        ('make = "network.py:make"', 'make = "network"', "$.network.make"),
        ('license = "MIT"', "", "license"),
        ("default = ", "default = 1.3 # ", "default is 1.3, expected 1 or one of rates"),
        ("[members]", "[members", "recipe.toml"),
    ],
)
def test_wrong_recipe(tmp_path: Path, old: str, new: str, named: str) -> None:
    """Unknown keys, values out of range, wrong words and broken TOML are errors that name file and field."""
    with pytest.raises(SettingsError) as caught:
        Recipe.load(changed(tmp_path, old, new))
    assert "recipe.toml" in str(caught.value)
    assert named in str(caught.value)


def test_missing_recipe(tmp_path: Path) -> None:
    """A folder without a recipe is an error that says what to give."""
    with pytest.raises(SettingsError, match="folder of a family's recipe"):
        Recipe.load(tmp_path)


def test_digest_follows_content(tmp_path: Path) -> None:
    """Any changed value changes the digest that checkpoints are bound to, the same text does not."""
    shutil.copy(FASHION / "recipe.toml", tmp_path)
    assert Recipe.load(tmp_path).digest() == Recipe.load(FASHION).digest()
    assert Recipe.load(changed(tmp_path, "seed = 0", "seed = 1")).digest() != Recipe.load(FASHION).digest()
