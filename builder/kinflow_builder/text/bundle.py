"""A text family's bundle: graphs, tokenizer, chat template, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from kinflow_builder.text import graph
from kinflow_builder.text.cut import EXITS, MEMBERS, ON_DEVICE, Cut, segments
from kinflow_builder.text.figures import Figures
from kinflow_builder.text.shape import Branch, Model

MANIFEST = "family.json"


@dataclass(frozen=True)
class About:
    """What a bundle says of itself."""

    id: str
    version: str
    title: str
    license: str
    context: int
    """Positions that a session may have; no more than the model was trained for."""


@dataclass(frozen=True)
class Texts:
    """Text <-> token ids."""

    tokenizer: bytes
    """tokenizer.json"""
    chat_template: str
    """jinja2"""
    stop_tokens: list[int]


def write_graphs(
    folder: Path, model: Model, cut: Cut, branches: dict[str, Branch], done: Callable[[str], None]
) -> dict[str, Any]:
    """All graphs of a family, into `folder`; the manifest's `segments`. `done` gets each file's name."""
    shape = model.shape

    def save(made: onnx.ModelProto, name: str) -> dict[str, Any]:
        onnx.save(made, folder / name)
        done(name)
        return {"file": describe(folder, name)}

    listed: dict[str, Any] = {}
    for name, part in segments(model, cut, branches).items():
        graphs = {}
        for precision in _precisions(name):
            made = graph.stack(shape, part.layers, part.norm, part.embedding, precision)
            graphs[precision] = save(made, f"{name}-{precision}.onnx")
        layers = len(part.layers)
        parameters = layers * shape.layer_parameters + sum(x.size for x in (part.norm, part.embedding) if x is not None)
        listed[name] = {
            "kind": part.kind,
            "source": part.source,
            "result": part.result,
            "layers": layers,
            "graphs": graphs,
            "macs": layers * shape.layer_macs,
            "parameters": parameters,
        }
    listed["head"] = {
        "kind": "head",
        "source": "hidden",
        "result": "logits",
        "layers": 0,
        "graphs": {
            precision: save(graph.head(model.head, precision), f"head-{precision}.onnx")
            for precision in _precisions("head")
        },
        "macs": shape.head_macs,
        "parameters": shape.head_macs,
    }
    return listed


def write_manifest(
    folder: Path, about: About, model: Model, cut: Cut, texts: Texts, listed: dict[str, Any], figures: Figures
) -> None:
    """tokenizer.json, chat_template.jinja and family.json, beside the graphs."""
    (folder / "tokenizer.json").write_bytes(texts.tokenizer)
    (folder / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    shape = model.shape
    manifest = {
        "schema": 1,
        "id": about.id,
        "version": about.version,
        "task": "text-generation",
        "title": about.title,
        "license": about.license,
        "vocabulary": shape.vocabulary,
        "width": shape.width,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "context": about.context,
        "tokenizer": describe(folder, "tokenizer.json"),
        "chat_template": describe(folder, "chat_template.jinja"),
        "stop_tokens": texts.stop_tokens,
        "splits": {
            name: {
                "after_layer": layer,
                "codecs": {
                    "int8": {"kind": "token-int8", "scale": figures.scales[name]},
                    "f16": {"kind": "token-f16"},
                },
            }
            for name, layer in (("s1", cut.s1), ("s2", cut.s2))
        },
        "segments": listed,
        "exits": {
            name: {
                "segments": path,
                "temperature": figures.exits[name].temperature,
                "agreement": figures.exits[name].agreement,
                "perplexity": figures.exits[name].perplexity,
                "certificate": None,
            }
            for name, path in EXITS.items()
        },
        "members": {name: {"segments": parts} for name, parts in MEMBERS.items()},
        "margin_bound": figures.margin_bound,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def describe(folder: Path, name: str) -> dict[str, Any]:
    """A file that stands in the folder, as the manifest lists it."""
    raw = (folder / name).read_bytes()
    return {"path": name, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}


def _precisions(name: str) -> tuple[graph.Precision, ...]:
    return ("int8", "float") if name in ON_DEVICE else ("float",)
