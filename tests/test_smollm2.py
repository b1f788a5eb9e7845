"""The committed branches of families/smollm2: of this recipe, of its sizes, small enough for a repository."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("safetensors", reason="pip install 'kinflow[builder]'")

from kinflow_builder.text import points, stored
from kinflow_builder.text.figures import Figures
from kinflow_builder.text.recipe import load

pytestmark = pytest.mark.builder

FOLDER = Path(__file__).parents[1] / "families/smollm2"
MOST_BYTES = 40_000_000


@pytest.mark.parametrize("exit", ["device", "edge"])
def test_branch_is_of_this_recipe(exit: str) -> None:
    """A change of the recipe that asks for other branches does not go unnoticed."""
    recipe = load(FOLDER)
    branch = stored.read(stored.path_of(FOLDER, exit), recipe.digest())
    assert len(branch.layers) == {"device": recipe.cut.device_layers, "edge": recipe.cut.edge_layers}[exit]
    assert branch.bridge is not None
    assert branch.bridge.weight.shape == (576, 576)


def test_branches_are_small() -> None:
    """All that is committed of them is below forty megabytes."""
    assert sum(path.stat().st_size for path in (FOLDER / "branches").iterdir()) < MOST_BYTES


def test_device_agrees_often_and_sweep_has_its_cut() -> None:
    """The measured device exit chooses the model's token more often than not, later exits more often still."""
    figures = msgspec.json.decode((FOLDER / "branches/figures.json").read_bytes(), type=Figures)
    agreement = [exit.agreement for exit in figures.exits.values()]
    assert agreement == sorted(agreement)
    assert agreement[0] >= 0.55
    cut = load(FOLDER).cut
    assert (cut.s1, cut.device_layers) in {(point.after_layer, point.branch_layers) for point in points.read(FOLDER)}
