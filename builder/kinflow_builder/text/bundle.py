"""A text family's bundle: graphs, tokenizer, chat template, and the manifest that lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx

from kinflow.bundle import MANIFEST
from kinflow.text.manifest import (
    HEAD,
    Exit,
    Graph,
    Member,
    Precision,
    Segment,
    Split,
    TextManifest,
    TokenCodec,
)
from kinflow_builder.bundle import describe
from kinflow_builder.text import graph
from kinflow_builder.text.cut import EXITS, MEMBERS, ON_DEVICE, Cut, segments
from kinflow_builder.text.figures import Figures
from kinflow_builder.text.shape import Branch, Model, Texts
from kinflow_builder.text.shortlist import Sketch

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


@dataclass(frozen=True)
class About:
    """What a bundle says of itself."""

    id: str
    version: str
    title: str
    license: str
    context: int
    """Positions that a session may have; no more than the model was trained for."""


def write_graphs(
    folder: Path,
    model: Model,
    cut: Cut,
    branches: dict[str, Branch],
    sketch: Sketch | None,
    done: Callable[[str], None],
) -> dict[str, Segment]:
    """All graphs of a family, into `folder`, as the manifest lists them; `done` gets each file's name."""
    shape = model.shape

    def save(made: onnx.ModelProto, name: str) -> Graph:
        onnx.save(made, folder / name)
        done(name)
        return Graph(describe(folder, name))

    listed: dict[str, Segment] = {}
    for name, part in segments(model, cut, branches).items():
        graphs = {}
        for precision in precisions(name):
            made = graph.stack(shape, part.layers, part.norm, part.embedding, part.bridge, precision)
            graphs[precision] = save(made, f"{name}-{precision}.onnx")
        layers = len(part.layers)
        others = sum(values.size for values in (part.norm, part.embedding) if values is not None)
        bridge = 0 if part.bridge is None else part.bridge.weight.size
        listed[name] = Segment(
            kind=part.kind,
            source=part.source,
            result=part.result,
            layers=layers,
            graphs=graphs,
            macs=layers * shape.layer_macs + bridge,
            parameters=layers * shape.layer_parameters + others + bridge,
        )
    heads = {
        precision: save(graph.head(model.head, precision, sketch), f"{HEAD}-{precision}.onnx")
        for precision in precisions(HEAD)
    }
    listed[HEAD] = Segment("head", "hidden", "logits", 0, heads, shape.head_macs, shape.head_macs)
    return listed


def write_manifest(
    folder: Path,
    about: About,
    model: Model,
    cut: Cut,
    texts: Texts,
    listed: dict[str, Segment],
    figures: Figures,
) -> TextManifest:
    """tokenizer.json, chat_template.jinja and family.json, beside the graphs."""
    (folder / TOKENIZER).write_bytes(texts.tokenizer)
    (folder / TEMPLATE).write_text(texts.chat_template, encoding="utf-8")
    shape = model.shape
    manifest = TextManifest(
        schema=1,
        id=about.id,
        version=about.version,
        task="text-generation",
        title=about.title,
        license=about.license,
        vocabulary=shape.vocabulary,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        context=about.context,
        tokenizer=describe(folder, TOKENIZER),
        chat_template=describe(folder, TEMPLATE),
        stop_tokens=texts.stop_tokens,
        splits={
            name: Split(layer, {"int8": TokenCodec("token-int8", tuple(scale)), "f16": TokenCodec("token-f16")})
            for name, layer, scale in (("s1", cut.s1, figures.scales["s1"]), ("s2", cut.s2, figures.scales["s2"]))
        },
        segments=listed,
        exits={
            name: Exit(
                segments=path,
                temperature=figures.exits[name].temperature,
                agreement=figures.exits[name].agreement,
                perplexity=figures.exits[name].perplexity,
                certificate=figures.exits[name].certificate,
            )
            for name, path in EXITS.items()
        },
        members={name: Member(parts) for name, parts in MEMBERS.items()},
        margin_bound=figures.margin_bound,
    )
    raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / MANIFEST).write_bytes(raw + b"\n")
    return manifest


def precisions(name: str) -> tuple[Precision, ...]:
    """Of a segment's graphs, the one that ships first."""
    return ("int8", "float") if name in ON_DEVICE else ("float",)
