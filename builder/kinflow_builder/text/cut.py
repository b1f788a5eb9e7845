"""Where a model is cut, and the segments that this makes: shared by graphs, training and measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinflow.errors import SettingsError
from kinflow_builder.text.shape import Branch, Bridge, Floats, Model, Shape, Weights

EXITS = {
    "device": ["lower", "branch-device"],
    "edge": ["lower", "upper", "branch-edge"],
    "cloud": ["lower", "upper", "top"],
}
"""What leads to each exit; the head follows."""
MEMBERS = {
    "device": ["lower", "branch-device", "head"],
    "edge": ["upper", "branch-edge", "head"],
    "cloud": ["upper", "top", "head"],
}
ON_DEVICE = ("lower", "branch-device", "head")
"""Segments with an int8 graph too."""


@dataclass(frozen=True)
class Cut:
    """Layers below the splits, and layers of the branches."""

    s1: int
    """The device runs layers 0 to s1 - 1."""
    s2: int
    """The edge goes on to layer s2 - 1."""
    device_layers: int
    edge_layers: int

    def check(self, shape: Shape) -> None:
        """Raises SettingsError where the model cannot be cut so."""
        if not 0 < self.s1 < self.s2 < shape.layers:
            raise SettingsError(f"cut: s1 is {self.s1}, s2 {self.s2}: expected 0 < s1 < s2 < {shape.layers} layers")
        for name, layers, most in (
            ("device_layers", self.device_layers, shape.layers - self.s1),
            ("edge_layers", self.edge_layers, shape.layers - self.s2),
        ):
            if not 0 < layers <= most:
                raise SettingsError(f"cut.{name} is {layers}, expected 1 to {most}, the model's layers after the split")


@dataclass(frozen=True)
class Segment:
    """Weights of one segment, as `graph.stack` takes them."""

    kind: Literal["trunk", "branch"]
    source: str
    result: str
    layers: list[Weights]
    norm: Floats | None = None
    embedding: Floats | None = None
    bridge: Bridge | None = None


def segments(model: Model, cut: Cut, branches: dict[str, Branch]) -> dict[str, Segment]:
    """All segments but the head, by name; `branches` by exit. Raises SettingsError."""
    cut.check(model.shape)
    device, edge = branches["device"], branches["edge"]
    return {
        "lower": Segment("trunk", "ids", "s1", model.layers[: cut.s1], embedding=model.embedding),
        "branch-device": Segment("branch", "s1", "device", device.layers, device.norm, bridge=device.bridge),
        "upper": Segment("trunk", "s1", "s2", model.layers[cut.s1 : cut.s2]),
        "branch-edge": Segment("branch", "s2", "edge", edge.layers, edge.norm, bridge=edge.bridge),
        "top": Segment("trunk", "s2", "cloud", model.layers[cut.s2 :], model.norm),
    }


def untrained(model: Model, cut: Cut) -> dict[str, Branch]:
    """Branches that nobody has trained: the model's next layers after each split, and its final norm."""
    cut.check(model.shape)
    begins = {"device": (cut.s1, cut.device_layers), "edge": (cut.s2, cut.edge_layers)}
    return {
        name: Branch([dict(layer) for layer in model.layers[begin : begin + layers]], model.norm.copy())
        for name, (begin, layers) in begins.items()
    }
