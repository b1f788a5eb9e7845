"""What is measured of a text family, by its own graphs: agreement, perplexity, confidence, size of features.

The largest member alone, in floats, is the reference; members are measured as they serve: the device's segments at the
precision that ships, servers on features as they are coded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kinflow.errors import InputError
from kinflow.text.codec import Int8Codec
from kinflow.text.manifest import Certificate, Precision
from kinflow_builder.calibrate import certify, temperature
from kinflow_builder.text.chain import Floats, Ids, Part, open_graph
from kinflow_builder.text.cut import EXITS

Number = TypeVar("Number", bound=np.generic)

DEVICE, LAST = "device", "cloud"
SENT_TO = {"s1": "upper", "s2": "top"}
"""The segments that get a split's features over a network."""
BATCH = 8
# Logits of so many positions are looked at together.
ROWS = 256
# Of the texts: they fit temperatures, the others certify.
FITTING_SHARE = 0.25
FITTING_ROWS = 1000
# A text's first tokens have features a hundred times as large; they would hide the usual size of a channel.
OUTLIER = 4.0


class ExitFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one exit."""

    agreement: float
    """Share of positions of the largest member's own greedy texts where both choose the same token."""
    perplexity: float
    """On text that people wrote."""
    temperature: float = 1.0
    """With it, the exit's confidence is how often it agrees."""
    certificate: Certificate | None = None


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a family."""

    exits: dict[str, ExitFigures]
    scales: dict[str, list[float]]
    """Root mean square of each channel of the features, by split."""
    margin_bound: float
    """By how much coding features as float16 may move a logit."""
    perplexity_float: float
    """Of the largest member alone, in floats."""
    agreement_float: float
    """The device exit's agreement with graphs that compute with floats."""
    agreement_shortlist: float
    """Share of positions where the device's shortlist chooses the token that its whole head does."""
    own_tokens: int
    """Positions that agreement was measured on."""
    written_tokens: int
    own_source: str
    """Whose prompts the greedy texts continue."""
    written_source: str
    trained_on: str = ""


@dataclass(frozen=True)
class Samples:
    """What figures are measured on."""

    own: Ids
    """[texts, tokens], partly the largest member's own greedy tokens."""
    chosen: npt.NDArray[np.bool_]
    """[texts, tokens]: the token is such a one."""
    written: Ids
    """[texts, tokens] by people."""
    own_source: str
    written_source: str


class Promise(NamedTuple):
    """What certificates must hold."""

    epsilon: float
    delta: float


class Graphs:
    """A bundle's graphs: the device's at a precision, the rest as floats."""

    def __init__(self, folder: Path, device: Precision, threads: int = 1) -> None:
        def path(name: str, precision: Precision) -> Path:
            return folder / f"{name}-{precision}.onnx"

        on_device = set(EXITS[DEVICE])
        names = {name for exit in EXITS.values() for name in exit}
        self.parts = {
            name: Part(open_graph(path(name, device if name in on_device else "float"), threads)) for name in names
        }
        self.heads = {name: open_graph(path("head", device if name == DEVICE else "float"), threads) for name in EXITS}
        self._codecs: dict[str, Int8Codec] = {}

    def forget(self) -> None:
        """The next texts begin anew."""
        for part in self.parts.values():
            part.forget()

    def code(self, scales: dict[str, list[float]]) -> None:
        """From here on servers get features coded, as a bundle with these `scales` of its splits does it."""
        self._codecs = {SENT_TO[split]: Int8Codec(np.array(scale, np.float32)) for split, scale in scales.items()}

    def run(self, ids: Ids, exits: tuple[str, ...] = tuple(EXITS)) -> dict[str, Floats]:
        """The next tokens [B,T] -> normed hidden values by exit, and the features by segment."""
        found: dict[str, Floats] = {}
        for name in exits:
            values: npt.NDArray[Any] = ids
            for segment in EXITS[name]:
                if segment not in found:
                    found[segment] = self.parts[segment].run(self._received(segment, values))
                values = found[segment]
            found[name] = found[EXITS[name][-1]]
        return found

    def _received(self, segment: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What `segment` gets of these ids or features."""
        codec = self._codecs.get(segment)
        if codec is None:
            return values
        rows = values.reshape(-1, values.shape[-1])
        return codec.decode(codec.encode(rows), len(rows)).reshape(values.shape)

    def whole(self, ids: Ids, exits: tuple[str, ...] = tuple(EXITS)) -> dict[str, Floats]:
        """`run` for texts from their beginning."""
        self.forget()
        return self.run(ids, exits)

    def logits(self, exit: str, hidden: Floats) -> Floats:
        """hidden [N,d] -> [N,V]"""
        return self._head(exit, hidden, True)[-1]

    def listed(self, hidden: Floats) -> Ids:
        """hidden [N,d] -> the tokens [N] that the device's shortlist has best."""
        tokens, logits = self._head(DEVICE, hidden, False)
        return np.asarray(np.take_along_axis(tokens, logits.argmax(-1)[:, None], 1)[:, 0])

    def _head(self, exit: str, hidden: Floats, whole: bool) -> list[npt.NDArray[Any]]:
        given: dict[str, Any] = {"hidden": np.ascontiguousarray(hidden)}
        if exit == DEVICE and len(self.heads[exit].get_inputs()) == 2:
            given["all"] = np.array(whole)
        return list(self.heads[exit].run(None, given))


class Choices(NamedTuple):
    """Of one exit, at the positions whose next token the largest member chose."""

    token: Ids
    confidence: npt.NDArray[np.float64]


def greedy(graphs: Graphs, prompts: Ids, count: int) -> Ids:
    """prompts [B,T] with `count` tokens of the largest member behind each."""
    graphs.forget()
    texts, new = prompts, prompts
    for _ in range(count):
        hidden = graphs.run(new, (LAST,))[LAST]
        new = graphs.logits(LAST, hidden[:, -1]).argmax(-1)[:, None]
        texts = np.concatenate([texts, new], 1)
    return texts


def measure(graphs: Graphs, exact: Graphs, samples: Samples, promise: Promise) -> Figures:
    """`exact`: the same family with the device's graphs as floats. Raises InputError for too short texts."""
    cut = max(1, int(FITTING_SHARE * len(samples.own)))
    if not (samples.chosen[:cut, 1:].any() and samples.chosen[cut:, 1:].any()):
        raise InputError("the texts end before an answer begins: give the recipe more check.tokens or check.texts")
    features = graphs.whole(samples.own[:BATCH], (LAST,))
    scales = {"s1": _scale(features["lower"]), "s2": _scale(features["upper"])}
    graphs.code(scales)
    temperatures = _temperatures(graphs, samples.own[:cut], samples.chosen[:cut])
    found = _choices(graphs, samples, temperatures)
    taught = samples.own[:, 1:][samples.chosen[:, 1:]]
    # Neighbours are alike: some texts fit, others certify.
    fitted = int(samples.chosen[:cut, 1:].sum())
    perplexities = _perplexities(graphs, samples.written, tuple(EXITS))
    exits = {}
    for name in EXITS:
        choice = found[name]
        same = choice.token == taught
        certificate = None
        if name != LAST:
            certificate = _certificate(choice.confidence[fitted:], ~same[fitted:], promise)
        exits[name] = ExitFigures(
            agreement=round(float(same.mean()), 4),
            perplexity=round(perplexities[name], 3),
            temperature=temperatures[name],
            certificate=certificate,
        )
    floats = _choices(exact, samples, {DEVICE: 1.0})[DEVICE].token
    return Figures(
        exits=exits,
        scales=scales,
        margin_bound=_margin_bound(exact, samples.own[:BATCH]),
        perplexity_float=round(_perplexities(exact, samples.written, (LAST,))[LAST], 3),
        agreement_float=round(float((floats == taught).mean()), 4),
        agreement_shortlist=round(_agreement_shortlist(graphs, samples), 4),
        own_tokens=len(taught),
        written_tokens=samples.written.size,
        own_source=samples.own_source,
        written_source=samples.written_source,
    )


def _temperatures(graphs: Graphs, texts: Ids, chosen: npt.NDArray[np.bool_]) -> dict[str, float]:
    hidden: dict[str, list[Floats]] = {name: [] for name in EXITS}
    targets = []
    for ids, mask in zip(_batches(texts), _batches(chosen), strict=True):
        places = mask[:, 1:]
        targets.append(ids[:, 1:][places])
        for name in EXITS:
            hidden[name].append(graphs.whole(ids, (name,))[name][:, :-1][places])
    labels = np.concatenate(targets)[:FITTING_ROWS]
    # The last exit agrees with itself always, however sure it is.
    del hidden[LAST]
    return {LAST: 1.0} | {
        name: round(temperature(graphs.logits(name, np.concatenate(parts)[:FITTING_ROWS]), labels), 4)
        for name, parts in hidden.items()
    }


def _choices(graphs: Graphs, samples: Samples, temperatures: dict[str, float]) -> dict[str, Choices]:
    names = tuple(temperatures)
    tokens: dict[str, list[Ids]] = {name: [] for name in names}
    confidences: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in names}
    for ids, mask in zip(_batches(samples.own), _batches(samples.chosen), strict=True):
        hidden = graphs.whole(ids, names)
        for name in names:
            rows = hidden[name][:, :-1][mask[:, 1:]]
            for begin in range(0, len(rows), ROWS):
                scaled = graphs.logits(name, rows[begin : begin + ROWS]) / temperatures[name]
                tokens[name].append(scaled.argmax(-1))
                # Of the likeliest token: 1 / sum of exp(other - it).
                shifted = np.exp(scaled - scaled.max(-1, keepdims=True))
                confidences[name].append(1 / shifted.sum(-1, dtype=np.float64))
    return {name: Choices(np.concatenate(tokens[name]), np.concatenate(confidences[name])) for name in names}


def _agreement_shortlist(graphs: Graphs, samples: Samples) -> float:
    hidden = graphs.whole(samples.own[:BATCH], (DEVICE,))[DEVICE][samples.chosen[:BATCH]]
    return float((graphs.listed(hidden) == graphs.logits(DEVICE, hidden).argmax(-1)).mean())


def _certificate(
    confidence: npt.NDArray[np.float64], losses: npt.NDArray[np.bool_], promise: Promise
) -> Certificate | None:
    found = certify(confidence, losses, promise.epsilon, promise.delta)
    if found.kept_share == 0:
        return None
    return Certificate(found.threshold, promise.epsilon, promise.delta, found.n, round(found.kept_share, 4))


def _perplexities(graphs: Graphs, written: Ids, exits: tuple[str, ...]) -> dict[str, float]:
    total = dict.fromkeys(exits, 0.0)
    for ids in _batches(written):
        hidden = graphs.whole(ids, exits)
        targets = ids[:, 1:].ravel()
        for name in exits:
            rows = hidden[name][:, :-1].reshape(len(targets), -1)
            for begin in range(0, len(rows), ROWS):
                part = slice(begin, begin + ROWS)
                total[name] += negative_log_likelihood(graphs.logits(name, rows[part]), targets[part])
    return {name: float(np.exp(value / written[:, 1:].size)) for name, value in total.items()}


def negative_log_likelihood(logits: Floats, targets: Ids) -> float:
    """Summed over rows; logits [n,V], targets [n]."""
    shifted = logits - logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    return float((normaliser - shifted[np.arange(len(targets)), targets]).sum())


def _margin_bound(graphs: Graphs, texts: Ids) -> float:
    """Twice the largest difference of a logit that rounding the features at s1 to float16 makes."""
    exact = graphs.whole(texts, (LAST,))
    for name in ("upper", "top"):
        graphs.parts[name].forget()
    hidden = exact["lower"].astype(np.float16).astype(np.float32)
    hidden = graphs.parts["top"].run(graphs.parts["upper"].run(hidden))
    largest = 0.0
    for ours, theirs in zip(hidden, exact[LAST], strict=True):
        difference = graphs.logits(LAST, ours) - graphs.logits(LAST, theirs)
        largest = max(largest, float(np.abs(difference).max()))
    return float(f"{2 * largest:.3g}")


def _scale(features: Floats) -> list[float]:
    rows = features.reshape(-1, features.shape[-1])
    size = np.linalg.norm(rows, axis=1)
    usual = rows[size < OUTLIER * np.median(size)]
    return [float(f"{value:.4g}") for value in np.maximum(np.sqrt(np.square(usual).mean(0)), 1e-6)]


def _batches(texts: npt.NDArray[Number]) -> list[npt.NDArray[Number]]:
    return [texts[begin : begin + BATCH] for begin in range(0, len(texts), BATCH)]
