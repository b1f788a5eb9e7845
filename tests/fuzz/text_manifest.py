"""The manifest of a language model that exists nowhere: for parsers alone."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 8


def _file(path: str) -> dict[str, Any]:
    return {"path": path, "sha256": "0" * 64, "bytes": 1000}


def _segment(name: str, kind: str, source: str, result: str, layers: int) -> dict[str, Any]:
    graphs = {"float": {"file": _file(f"{name}.onnx")}}
    ends = {"kind": kind, "source": source, "result": result}
    return {**ends, "layers": layers, "graphs": graphs, "macs": 10, "parameters": 10}


def _exit(*segments: str) -> dict[str, Any]:
    figures = {"temperature": 1.0, "agreement": 0.9, "perplexity": 8.0}
    certificate = {"threshold": 0.5, "epsilon": 0.1, "delta": 0.1, "n": 100, "kept_share": 0.5}
    return {"segments": list(segments), **figures, "certificate": certificate}


MANIFEST = {
    "schema": 1,
    "id": "lm",
    "version": "1.0.0",
    "task": "text-generation",
    "title": "t",
    "license": "l",
    "vocabulary": 300,
    "width": WIDTH,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 4,
    "context": 64,
    "tokenizer": _file("tokenizer.json"),
    "chat_template": _file("chat.jinja"),
    "stop_tokens": [2],
    "splits": {
        "s1": {
            "after_layer": 1,
            "codecs": {"int8": {"kind": "token-int8", "scale": [1.5] * WIDTH}, "f16": {"kind": "token-f16"}},
        }
    },
    "segments": {
        "lower": _segment("lower", "trunk", "ids", "s1", 1),
        "branch": _segment("branch", "branch", "s1", "edge", 1),
        "upper": _segment("upper", "trunk", "s1", "cloud", 2),
        "head": _segment("head", "head", "hidden", "logits", 0),
    },
    "exits": {"edge": _exit("lower", "branch"), "cloud": _exit("lower", "upper")},
    "members": {"edge": {"segments": ["branch", "head"]}, "cloud": {"segments": ["lower", "upper", "head"]}},
    "margin_bound": 0.1,
}
TEXT_MANIFEST = json.dumps(MANIFEST).encode()
