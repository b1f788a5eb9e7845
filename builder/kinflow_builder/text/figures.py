"""What is measured of a text family, by its own graphs: agreement, perplexity, confidence, size of features.

All of it on texts of token ids; the largest member is the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow_builder.text.chain import Floats, Ids, Part, open_graph
from kinflow_builder.text.cut import EXITS

if TYPE_CHECKING:
    from kinflow_builder.text.graph import Precision

DEVICE = "device"
ROUNDED = 1e-3


class ExitFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one exit."""

    agreement: float
    """Share of positions of the largest member's own greedy texts where both choose the same token."""
    perplexity: float
    """On text that people wrote."""
    temperature: float = 1.0
    """Of its confidence, fitted to how often it agrees."""


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a family."""

    exits: dict[str, ExitFigures]
    scales: dict[str, list[float]]
    """Root mean square of each channel of the features, by split."""
    margin_bound: float
    """By how much coding features as float16 may move a logit."""


class Graphs:
    """A bundle's graphs: the device's at a precision, the rest as floats."""

    def __init__(self, folder: Path, device: Precision, threads: int = 1) -> None:
        def path(name: str, precision: str) -> Path:
            return folder / f"{name}-{precision}.onnx"

        on_device = {"lower", "branch-device"}
        names = {name for exit in EXITS.values() for name in exit}
        self.parts = {
            name: Part(open_graph(path(name, device if name in on_device else "float"), threads)) for name in names
        }
        self.heads = {name: open_graph(path("head", device if name == DEVICE else "float"), threads) for name in EXITS}

    def forget(self) -> None:
        """The next texts begin anew."""
        for part in self.parts.values():
            part.forget()

    def run(self, ids: Ids, exits: tuple[str, ...] = tuple(EXITS)) -> dict[str, Floats]:
        """The next tokens [B,T] -> normed hidden values by exit, and the features by segment."""
        found: dict[str, npt.NDArray[np.generic]] = {}
        for name in exits:
            values: npt.NDArray[np.generic] = ids
            for segment in EXITS[name]:
                if segment not in found:
                    found[segment] = self.parts[segment].run(values)
                values = found[segment]
            found[name] = values
        return found  # type: ignore[return-value]

    def logits(self, exit: str, hidden: Floats) -> Floats:
        """hidden [N,d] -> [N,V]"""
        return np.asarray(self.heads[exit].run(None, {"hidden": hidden})[0])


def greedy(graphs: Graphs, prompts: Ids, count: int) -> Ids:
    """prompts [B,T] with `count` tokens of the largest member behind each."""
    graphs.forget()
    texts, new = prompts, prompts
    for _ in range(count):
        hidden = graphs.run(new, ("cloud",))["cloud"]
        new = graphs.logits("cloud", hidden[:, -1]).argmax(-1)[:, None]
        texts = np.concatenate([texts, new], 1)
    graphs.forget()
    return texts


def measure(graphs: Graphs, own: Ids, begin: int, written: Ids) -> Figures:
    """`own`: greedy texts [n,T] whose tokens from `begin` on are the largest member's; `written`: texts of people."""
    agreement = _agreement(graphs, own, begin)
    perplexity = _perplexity(graphs, written)
    graphs.forget()
    features = graphs.run(own, ("cloud",))
    scales = {"s1": _scale(features["lower"]), "s2": _scale(features["upper"])}
    exits = {name: ExitFigures(agreement[name], perplexity[name]) for name in EXITS}
    return Figures(exits, scales, margin_bound(graphs, own))


def _agreement(graphs: Graphs, own: Ids, begin: int) -> dict[str, float]:
    graphs.forget()
    found = graphs.run(own)
    chosen = {name: _flat_logits(graphs, name, found[name][:, begin - 1 : -1]).argmax(-1) for name in EXITS}
    return {name: float((tokens == own[:, begin:].ravel()).mean()) for name, tokens in chosen.items()}


def _perplexity(graphs: Graphs, written: Ids) -> dict[str, float]:
    graphs.forget()
    found = graphs.run(written)
    targets = written[:, 1:].ravel()
    return {name: perplexity(_flat_logits(graphs, name, found[name][:, :-1]), targets) for name in EXITS}


def perplexity(logits: Floats, targets: Ids) -> float:
    """exp of the mean negative log likelihood; logits [n,V], targets [n]."""
    shifted = logits - logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    return float(np.exp((normaliser - shifted[np.arange(len(targets)), targets]).mean()))


def margin_bound(graphs: Graphs, texts: Ids) -> float:
    """The largest difference of a logit that rounding the features at s1 to float16 makes, doubled for safety."""
    graphs.forget()
    exact = graphs.run(texts, ("cloud",))
    for name in ("upper", "top"):
        graphs.parts[name].forget()
    hidden = exact["lower"].astype(np.float16).astype(np.float32)
    hidden = graphs.parts["top"].run(graphs.parts["upper"].run(hidden))
    width = hidden.shape[-1]
    difference = graphs.logits("cloud", hidden.reshape(-1, width)) - graphs.logits(
        "cloud", exact["cloud"].reshape(-1, width)
    )
    return 2 * float(np.abs(difference).max())


def _flat_logits(graphs: Graphs, exit: str, hidden: Floats) -> Floats:
    return graphs.logits(exit, np.ascontiguousarray(hidden.reshape(-1, hidden.shape[-1])))


def _scale(features: Floats) -> list[float]:
    rms = np.sqrt(np.square(features).mean((0, 1)))
    return [float(f"{value:.4g}") for value in np.maximum(rms, 1e-6)]
