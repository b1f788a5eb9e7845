"""What a machine computes of a bundle: runs on this machine and on the emulated board, and the results are compared.

    python answers.py make OUT BUNDLE...           graphs on made-up images, features coded
    python answers.py repeat MADE OUT BUNDLE...    the same inputs, features and payloads on another machine

MADE and OUT are folders with a file for each bundle, `<family>.npz`. One process for all of them: under emulation it
costs more to start one and to load the runtimes than to compute a small family.

Keys: `input/<segment>`, `run/<backend>/<segment>/<n>`, `payload/<split>/<codec>`, `decoded/<split>/<codec>`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kinflow import backends
from kinflow.errors import BackendError
from kinflow.family import INPUT, Family
from kinflow.tuning import made_up_images

# Under emulation an int8 graph takes 80 times as long: a large family gets one image.
LARGE_PIXELS = 64 * 64


def make(family: Family) -> dict[str, Any]:
    """Inputs of every segment, by running the segments before it; features of every split, coded."""
    spec = family.preprocess
    count = 1 if spec.height * spec.width > LARGE_PIXELS else 3
    at: dict[str, Any] = {INPUT: made_up_images((len(spec.mean), spec.height, spec.width), count)}
    found: dict[str, Any] = {}
    for name, segment in family.manifest.segments.items():
        if segment.source not in at or "onnx" not in segment.graphs:
            continue
        found[f"input/{name}"] = at[segment.source]
        graph = segment.graphs["onnx"]
        outputs = backends.open_graph("onnx", family.files[graph.file.path], graph, 1).run(at[segment.source])
        if segment.split is not None:
            at.setdefault(segment.split, outputs[0])
    for (split, name), codec in family.codecs.items():
        if split in at:
            payload = codec.encode(at[split][0])
            found[f"features/{split}/{name}"] = at[split][0]
            found[f"payload/{split}/{name}"] = np.frombuffer(payload, np.uint8)
            found[f"decoded/{split}/{name}"] = codec.decode(payload)
    return found | run(family, found)


def run(family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every graph for which there is an input and a runtime."""
    found: dict[str, Any] = {}
    for name, segment in family.manifest.segments.items():
        for backend, graph in segment.graphs.items():
            if f"input/{name}" not in inputs or not installed(backend):
                continue
            runner = backends.open_graph(backend, family.files[graph.file.path], graph, 1)
            try:
                outputs = runner.run(inputs[f"input/{name}"])
            except BackendError as exc:
                sys.exit(f"{backend} {name}: {exc}")
            for index, output in enumerate(outputs):
                found[f"run/{backend}/{name}/{index}"] = output
    return found


def installed(backend: str) -> bool:
    names = {"onnx": ("onnxruntime",), "tflite": ("tflite_runtime", "ai_edge_litert")}[backend]
    return any(find_spec(name) is not None for name in names)


def repeat(family: Family, made: dict[str, Any]) -> dict[str, Any]:
    """The other machine's features coded here, and its payloads decoded here."""
    found = run(family, made)
    for (split, name), codec in family.codecs.items():
        if f"payload/{split}/{name}" in made:
            found[f"payload/{split}/{name}"] = np.frombuffer(codec.encode(made[f"features/{split}/{name}"]), np.uint8)
            found[f"decoded/{split}/{name}"] = codec.decode(made[f"payload/{split}/{name}"].tobytes())
    return found


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    made_in = Path(paths.pop(0)) if verb == "repeat" else None
    out = Path(paths.pop(0))
    for path in paths:
        opened = Family.load(Path(path))
        name = f"{opened.id}.npz"
        result = make(opened) if made_in is None else repeat(opened, dict(np.load(made_in / name)))
        np.savez(out / name, **result)
