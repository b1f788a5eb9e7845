"""Places where a model could be cut, and what branches there reached: what `sweep` finds and the card shows."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kinflow_builder.text.shape import Shape
from kinflow_builder.text.stored import BRANCHES

SWEEP = "sweep.json"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place to cut, and one size of the branch there."""

    after_layer: int
    branch_layers: int
    cost_share: float
    """Multiplications of drafting a token, as a share of the whole model's."""
    untrained: float
    """Agreement on the model's own greedy texts."""
    agreement: float
    """The same after a short training; `texts` texts were seen once."""
    texts: int


def cost_share(shape: Shape, after: int, layers: int) -> float:
    """Of drafting with a bridge and `layers` layers of a branch behind the first `after` ones."""
    whole = shape.layers * shape.layer_macs + shape.head_macs
    return ((after + layers) * shape.layer_macs + shape.width**2 + shape.head_macs) / whole


def read(folder: Path) -> list[Point]:
    """Beside the recipe in `folder`; none where nobody has measured any."""
    path = folder / BRANCHES / SWEEP
    return msgspec.json.decode(path.read_bytes(), type=list[Point]) if path.is_file() else []


def write(folder: Path, points: list[Point]) -> None:
    path = folder / BRANCHES / SWEEP
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1) + b"\n")
