"""Small families made on the spot from ONNX operators: graphs and features of a wanted size, untrained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kinflow import manifest
from kinflow.bundle import MANIFEST
from kinflow.codec import pack_table, table_from_counts

CLASSES = 10
CODEC = "q8"
SPLIT = "s1"
SECOND = "s2"


@dataclass(frozen=True)
class Shape:
    """A small family: `layers` 3×3 convolutions of `width` channels on the device, a mean on the server.

    Images are uint8 [side, side]; the features at the split are [channels, side, side] and cost about one byte a
    value: the images are noise and the codec's table is flat.
    """

    side: int
    channels: int = 1
    layers: int = 0
    width: int = 32
    coded: bool = True
    """False: the features travel as plain levels, which costs next to no time."""
    chain: bool = False
    """The edge member hands its own features on, at a second split; otherwise edge and cloud run the same."""


def write(folder: Path, shape: Shape) -> Path:
    """Write the bundle into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.ones((shape.channels, 256), np.int64)
    flat = pack_table(table_from_counts(counts))
    table = _write(folder, "s1.q8.tab", flat) if shape.coded else None
    features = [shape.channels, shape.side, shape.side]
    image = [1, shape.side, shape.side]
    codec = manifest.Codec(
        kind="uniform-rans" if shape.coded else "uniform",
        bits=8,
        step=[1 / 255] * shape.channels,
        zero=[0] * shape.channels,
        table=table,
        bytes_mean=float(np.prod(features)),
    )
    exits = manifest.Exit(temperature=1.0, threshold=1.0, accuracy=0.0)
    split = manifest.Split(features, {CODEC: codec}, CODEC)
    graphs: list[tuple[str, str | None, str, bytes, list[int]]] = [
        ("input", SPLIT, "device", _device_graph(shape), image)
    ]
    if shape.chain:
        graphs.append((SPLIT, SECOND, "edge", _middle_graph(shape), features))
    graphs.append((SECOND if shape.chain else SPLIT, None, "cloud", _server_graph(shape), features))
    segments = {
        f"trunk{n}": _segment(folder, f"trunk{n}", graph, source, to, exit_, takes, features if to else None)
        for n, (source, to, exit_, graph, takes) in enumerate(graphs)
    }
    document = manifest.Manifest(
        schema=1,
        id="synthetic",
        version="1.0.0",
        task="image-classification",
        title="Made on the spot",
        license="Apache-2.0",
        labels=[f"class {n}" for n in range(CLASSES)],
        preprocess=manifest.Preprocess("L", shape.side, shape.side, [0.0], [1.0], "stretch"),
        splits={SPLIT: split, SECOND: split} if shape.chain else {SPLIT: split},
        segments=segments,
        exits={exit_: msgspec.structs.replace(exits, threshold=float(bool(to))) for _, to, exit_, _, _ in graphs},
        members={
            "device": manifest.Member(["trunk0"]),
            "edge": manifest.Member(["trunk0", "trunk1"]),
            "cloud": manifest.Member(list(segments)),
        },
    )
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    return folder


def _segment(
    folder: Path,
    name: str,
    model: bytes,
    source: str,
    split: str | None,
    exit_: str,
    takes: list[int],
    features: list[int] | None,
) -> manifest.Segment:
    outputs = [] if features is None else [manifest.Tensor("features", features)]
    outputs.append(manifest.Tensor("logits", [CLASSES]))
    graph = manifest.Graph(
        file=_write(folder, f"{name}.onnx", model),
        input=manifest.Tensor("x", takes),
        outputs=outputs,
        dynamic_batch=True,
        precision="float",
    )
    return manifest.Segment(source, split, exit_, {"onnx": graph}, macs=1, parameters=1)


def _device_graph(shape: Shape) -> bytes:
    """image -> features (the image in every channel), and logits from the convolutions' mean."""
    rng = np.random.default_rng(0)
    weights = {"spread": np.ones((shape.channels, 1, 1, 1), np.float32)}
    nodes = [helper.make_node("Conv", ["x", "spread"], ["features"])]
    last, width = "features", shape.channels
    for n in range(shape.layers):
        weights[f"w{n}"] = rng.normal(0, 0.05, (shape.width, width, 3, 3)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [last, f"w{n}"], [f"c{n}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{n}"], [f"r{n}"]))
        last, width = f"r{n}", shape.width
    return _model(nodes, weights, last, width, [1, shape.side, shape.side], [shape.channels, shape.side, shape.side])


def _middle_graph(shape: Shape) -> bytes:
    """Features -> the same, half as large, and logits."""
    size = [shape.channels, shape.side, shape.side]
    half = {"half": np.asarray(0.5, np.float32)}
    return _model([helper.make_node("Mul", ["x", "half"], ["features"])], half, "x", shape.channels, size, size)


def _server_graph(shape: Shape) -> bytes:
    return _model([], {}, "x", shape.channels, [shape.channels, shape.side, shape.side], None)


def _model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    last: str,
    width: int,
    takes: list[int],
    features: list[int] | None,
) -> bytes:
    """`nodes`, then the mean over the plane and a linear head on `last`, which has `width` channels."""
    weights["head"] = np.random.default_rng(1).normal(0, 1, (width, CLASSES)).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
    ]
    outputs = [] if features is None else [_value("features", features)]
    graph = helper.make_graph(
        nodes,
        "segment",
        [_value("x", takes)],
        [*outputs, _value("logits", [CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def _value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])


def _write(folder: Path, name: str, data: bytes) -> manifest.File:
    (folder / name).write_bytes(data)
    return manifest.File(name, hashlib.sha256(data).hexdigest(), len(data))
