"""Turns models into families: aligned, quantised, certified, with a card.

`kinflow build` does it from a command line; these names are for one's own scripts. They are imported when they are
used: recipes, data and certificates need no torch, the rest comes with `pip install 'kinflow[builder]'`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "Block": "blocks",
    "Bottleneck": "quantiser",
    "Build": "build",
    "Candidate": "choose",
    "Pictures": "folders",
    "Pretrained": "stitch",
    "Recipe": "recipe",
    "Segment": "trunk",
    "StitchRecipe": "stitch_recipe",
    "Trunk": "trunk",
    "Wishes": "own",
    "blocks_of": "blocks",
    "build_family": "build",
    "candidates": "choose",
    "choose_splits": "choose",
    "propose": "own",
    "trunk_of": "branches",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"kinflow_builder has no {name!r}, it has {', '.join(__all__)}")
    return getattr(import_module(f"kinflow_builder.{_MODULES[name]}"), name)
