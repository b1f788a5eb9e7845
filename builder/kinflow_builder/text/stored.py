"""Trained branches as small files beside the recipe: float16 safetensors, bound to the recipe that made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kinflow.errors import InputError, SettingsError
from kinflow.files import write_whole
from kinflow_builder.text.shape import LAYER, Branch, Bridge, Floats

BRANCHES = "branches"
NORM, WEIGHT, BIAS = "norm", "bridge.weight", "bridge.bias"


def path_of(folder: Path, exit: str) -> Path:
    """Of a branch of the recipe in `folder`."""
    return folder / BRANCHES / f"{exit}.safetensors"


def write(path: Path, branch: Branch, digest: str) -> None:
    from safetensors.numpy import save

    values = {f"{number}.{name}": layer[name] for number, layer in enumerate(branch.layers) for name in LAYER}
    values[NORM] = branch.norm
    if branch.bridge is not None:
        values |= {WEIGHT: branch.bridge.weight, BIAS: branch.bridge.bias}
    halves = {name: np.ascontiguousarray(value, np.float16) for name, value in values.items()}
    write_whole(path, save(halves, metadata={"recipe": digest}))


def read(path: Path, digest: str) -> Branch:
    """Raises InputError for a broken file, SettingsError for one of another recipe."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as stored:
            made_by = (stored.metadata() or {}).get("recipe")
            values = {name: stored.get_tensor(name).astype(np.float32) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise InputError(f"{path}: {exc}: train it with --train") from exc
    if made_by != digest:
        raise SettingsError(f"{path} was trained by another recipe: train anew with --train")
    return _branch(path, values)


def rounded(branch: Branch) -> Branch:
    """As it comes back from its file."""
    layers = [{name: _half(values) for name, values in layer.items()} for layer in branch.layers]
    bridge = branch.bridge
    if bridge is not None:
        bridge = Bridge(_half(bridge.weight), _half(bridge.bias))
    return Branch(layers, _half(branch.norm), bridge)


def _half(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _branch(path: Path, values: dict[str, Floats]) -> Branch:
    count = len(values) // len(LAYER)
    try:
        layers = [{name: values[f"{number}.{name}"] for name in LAYER} for number in range(count)]
        bridge = Bridge(values[WEIGHT], values[BIAS]) if WEIGHT in values else None
        return Branch(layers, values[NORM], bridge)
    except KeyError as exc:
        raise InputError(f"{path} has no weight {exc}: train it with --train") from exc
