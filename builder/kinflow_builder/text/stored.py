"""Branches and the shortlist's sketch, small files beside the recipe: float16 safetensors, bound to what made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kinflow.errors import InputError, SettingsError
from kinflow.files import write_whole
from kinflow_builder.text.shape import LAYER, Branch, Bridge, Floats
from kinflow_builder.text.shortlist import Sketch

BRANCHES = "branches"
SHORTLIST = "shortlist"
NORM, WEIGHT, BIAS = "norm", "bridge.weight", "bridge.bias"


def path_of(folder: Path, name: str) -> Path:
    """Of an exit's branch, or of the SHORTLIST, of the recipe in `folder`."""
    return folder / BRANCHES / f"{name}.safetensors"


def write(path: Path, branch: Branch, digest: str) -> None:
    values = {f"{number}.{name}": layer[name] for number, layer in enumerate(branch.layers) for name in LAYER}
    values[NORM] = branch.norm
    if branch.bridge is not None:
        values |= {WEIGHT: branch.bridge.weight, BIAS: branch.bridge.bias}
    _write(path, values, digest)


def read(path: Path, digest: str) -> Branch:
    """Raises InputError for a broken file, SettingsError for one of another recipe."""
    return _branch(path, _read(path, digest))


def write_sketch(path: Path, sketch: Sketch, digest: str) -> None:
    _write(path, vars(sketch), digest)


def read_sketch(path: Path, digest: str) -> Sketch:
    """Raises as `read` does."""
    values = _read(path, digest)
    try:
        return Sketch(**values)
    except TypeError as exc:
        raise InputError(f"{path} has {', '.join(sorted(values))}: delete it, then it is made anew") from exc


def _write(path: Path, values: dict[str, Floats], digest: str) -> None:
    from safetensors.numpy import save

    halves = {name: np.ascontiguousarray(value, np.float16) for name, value in values.items()}
    write_whole(path, save(halves, metadata={"recipe": digest}))


def _read(path: Path, digest: str) -> dict[str, Floats]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as stored:
            made_by = (stored.metadata() or {}).get("recipe")
            values = {name: stored.get_tensor(name).astype(np.float32) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise InputError(f"{path}: {exc}: train it with --train") from exc
    if made_by != digest:
        raise SettingsError(f"{path} was trained by another recipe: train anew with --train")
    return values


def rounded(branch: Branch) -> Branch:
    """As it comes back from its file."""
    layers = [{name: _half(values) for name, values in layer.items()} for layer in branch.layers]
    bridge = branch.bridge
    if bridge is not None:
        bridge = Bridge(_half(bridge.weight), _half(bridge.bias))
    return Branch(layers, _half(branch.norm), bridge)


def rounded_sketch(sketch: Sketch) -> Sketch:
    """As it comes back from its file."""
    return Sketch(_half(sketch.centre), _half(sketch.down), _half(sketch.up))


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
