"""ONNX graphs of segments, written operator by operator from numpy weights; no torch.

Inputs: `ids` or `hidden`, `past` [B,P,L,2,H,D], `positions` [B,T], `bias` [B,1,T,P+T]; outputs `result` [B,T,d] and
`present` [B,T,L,2,H,D], which are the new entries alone. B, T and P are free, P = 0 too. The head: `hidden` [N,d] ->
`logits` [N,V]. Keys stand in the cache after their rotation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kinflow.text.manifest import Precision
from kinflow_builder.text.shape import Bridge, Floats, Shape, Weights

OPSET = 20
IR_VERSION = 9
CONTRIB = "com.microsoft"
# Values of a matrix' row that have a scale of their own.
BLOCK = 32
# onnxruntime's: activations are rounded to 8 bits too, block by block.
INT8_ARITHMETIC = 4


class Writer:
    """Nodes and constants of a graph as it grows. Every method that computes returns the name of what it made.

    With the precision int8 every matrix has 8 bits and a scale for each block of 32 values, and what it is applied to
    is rounded the same way, token by token: what else is in a batch changes nothing.
    """

    def __init__(self, precision: Precision = "float") -> None:
        self.precision = precision
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        name = output or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def integers(self, *values: int) -> str:
        """Shape or axes; equal ones are kept once."""
        return self.constant("i" + "_".join(map(str, values)), values, np.int64)

    def integer(self, value: int) -> str:
        """A scalar index: Gather drops its axis."""
        return self.constant(f"at{value}", value, np.int64)

    def linear(self, values: str, name: str, weight: Floats) -> str:
        """weight [outputs, inputs]"""
        if self.precision == "float":
            return self.node("MatMul", [values, self.constant(name, weight.T)])
        levels, scale = quantised(weight)
        outputs, inputs = weight.shape
        # Levels are stored from 0 on; 128 stands for 0.0.
        stored = self.constant(f"{name}.levels", levels.astype(np.int16) + 128, np.uint8)
        scales = self.constant(f"{name}.scale", scale[:, :, 0])
        sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": INT8_ARITHMETIC}
        return self.node("MatMulNBits", [values, stored, scales], domain=CONTRIB, **sizes)

    def rows(self, name: str, table: Floats, ids: str) -> str:
        """Those rows of a table [count, width] that ids name."""
        if self.precision == "float":
            return self.node("Gather", [self.constant(name, table), ids])
        count, width = table.shape
        levels, scale = quantised(table)
        stored = self.constant(f"{name}.levels", levels.reshape(count, width), np.int8)
        chosen = self.node("Cast", [self.node("Gather", [stored, ids])], to=TensorProto.FLOAT)
        blocks = self.node("Reshape", [chosen, self.integers(0, 0, width // BLOCK, BLOCK)])
        scales = self.node("Gather", [self.constant(f"{name}.scale", scale), ids])
        return self.node("Reshape", [self.node("Mul", [blocks, scales]), self.integers(0, 0, width)])

    def norm(self, values: str, name: str, weight: Floats, epsilon: float) -> str:
        """Root mean square normalisation over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""
        mean = self.node("ReduceMean", [self.node("Mul", [values, values]), self.integers(-1)], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, self.constant("epsilon", epsilon)])])
        return self.node("Mul", [self.node("Div", [values, root]), self.constant(name, weight)])

    def added_and_normed(self, values: str, more: str, name: str, weight: Floats, epsilon: float) -> tuple[str, str]:
        """values + more, and `norm` of it: onnxruntime has both as one node."""
        kind = "SkipSimplifiedLayerNormalization"
        normed, total = f"normed{len(self.nodes)}", f"total{len(self.nodes)}"
        inputs, outputs = [values, more, self.constant(name, weight)], [normed, "", "", total]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=normed, domain=CONTRIB, epsilon=epsilon))
        return total, normed

    def split(self, values: str, *sizes: int, axis: int) -> list[str]:
        parts = [f"part{len(self.nodes)}_{at}" for at in range(len(sizes))]
        inputs = [values, self.integers(*sizes)]
        self.nodes.append(helper.make_node("Split", inputs, parts, name=parts[0], axis=axis))
        return parts

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "segment", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kinflow")
        onnx.checker.check_model(made)
        return made


def quantised(matrix: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """matrix [rows, width] -> levels [rows, blocks, BLOCK] of -127…127 and scale [rows, blocks, 1]."""
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(blocks / scale).astype(np.int8), scale


def stack(
    shape: Shape,
    layers: list[Weights],
    norm: Floats | None = None,
    embedding: Floats | None = None,
    bridge: Bridge | None = None,
    precision: Precision = "float",
) -> onnx.ModelProto:
    """A segment of these layers, with what there is before them and `norm` [width] behind them.

    embedding: [vocabulary, width]
    """
    writer = Writer(precision)
    inputs, outputs = _interface(shape, len(layers), ids=embedding is not None)
    hidden = "hidden" if embedding is None else writer.rows("embedding", embedding, "ids")
    if bridge is not None:
        # Always as floats: no norm stands before it, and few channels are a hundred times as large as their neighbours.
        turned = writer.node("MatMul", [hidden, writer.constant("bridge", bridge.weight.T)])
        hidden = writer.node("Add", [turned, writer.constant("bridge.bias", bridge.bias)])
    writer.node("Reshape", ["past", writer.integers(0, 0, 2 * len(layers), shape.kv_heads, shape.head_size)], "flat")
    # [2L,B,H,P,D]: what one layer takes lies in one piece.
    writer.node("Transpose", ["flat"], "caches", perm=[2, 0, 3, 1, 4])
    _rotary(writer, shape)
    # The queries that share a key stand one behind another, so that no key is copied: the mask is repeated for them.
    writer.node("Concat", ["bias"] * (shape.heads // shape.kv_heads), "mask", axis=2)
    presents: list[str] = []
    normed = writer.norm(hidden, "0.attention_norm", layers[0]["attention_norm"], shape.epsilon)
    for index, weights in enumerate(layers):
        mixed = _attention(writer, shape, index, weights, normed, presents)
        hidden, normed = writer.added_and_normed(hidden, mixed, f"{index}.mlp_norm", weights["mlp_norm"], shape.epsilon)
        opened = _mlp(writer, shape, index, weights, normed)
        # What comes next takes it normed: the next layer, or what is behind the segment.
        following = layers[index + 1]["attention_norm"] if index + 1 < len(layers) else norm
        if following is None:
            hidden = writer.node("Add", [hidden, opened])
        else:
            hidden, normed = writer.added_and_normed(hidden, opened, f"{index}.next_norm", following, shape.epsilon)
    joined = writer.node("Concat", presents, axis=2)
    writer.node("Reshape", [joined, writer.integers(0, 0, len(layers), 2, shape.kv_heads, shape.head_size)], "present")
    writer.node("Identity", [hidden if norm is None else normed], "result")
    return writer.model(inputs, outputs)


def head(weight: Floats, precision: Precision = "float") -> onnx.ModelProto:
    """weight [vocabulary, width]"""
    writer = Writer(precision)
    writer.node("Identity", [writer.linear("hidden", "head", weight)], "logits")
    vocabulary, width = weight.shape
    return writer.model([_tensor("hidden", ["rows", width])], [_tensor("logits", ["rows", vocabulary])])


def _attention(writer: Writer, shape: Shape, index: int, weights: Weights, normed: str, presents: list[str]) -> str:
    """What a layer's attention adds. Nodes cost time, even small ones: one product makes queries, keys and values."""
    size, heads, kv_heads = shape.head_size, shape.heads, shape.kv_heads
    scaled = weights["query"] * np.float32(size**-0.5)
    joined = np.concatenate([scaled, weights["key"], weights["value"]])
    all_heads = _heads(writer, writer.linear(normed, f"{index}.joined", joined), heads + 2 * kv_heads, size)
    turning, value = writer.split(all_heads, heads + kv_heads, kv_heads, axis=2)
    query, key = writer.split(_rotated(writer, turning, size), heads, kv_heads, axis=2)
    for part in (key, value):
        presents.append(writer.node("Unsqueeze", [part, writer.integers(2)]))
    keys, values = (
        writer.node(
            "Concat",
            [
                writer.node("Gather", ["caches", writer.integer(2 * index + place)], axis=0),
                writer.node("Transpose", [part], perm=[0, 2, 1, 3]),
            ],
            axis=2,
        )
        for place, part in enumerate((key, value))
    )
    return writer.linear(_attend(writer, shape, query, keys, values), f"{index}.output", weights["output"])


def _mlp(writer: Writer, shape: Shape, index: int, weights: Weights, normed: str) -> str:
    """What a layer's MLP adds."""
    both = writer.linear(normed, f"{index}.gate_up", np.concatenate([weights["gate"], weights["up"]]))
    gate, up = writer.split(both, shape.inner, shape.inner, axis=-1)
    opened = writer.node("Mul", [gate, writer.node("Sigmoid", [gate])])
    return writer.linear(writer.node("Mul", [opened, up]), f"{index}.down", weights["down"])


def _attend(writer: Writer, shape: Shape, query: str, keys: str, values: str) -> str:
    """query [B,T,heads,D], scaled; keys and values [B,H,S,D] -> [B,T,heads*D]"""
    turned = writer.node("Transpose", [query], perm=[0, 2, 1, 3])
    grouped = writer.node("Reshape", [turned, writer.integers(0, shape.kv_heads, -1, shape.head_size)])
    scores = writer.node("MatMul", [grouped, writer.node("Transpose", [keys], perm=[0, 1, 3, 2])])
    shares = writer.node("Softmax", [writer.node("Add", [scores, "mask"])], axis=-1)
    mixed = writer.node("MatMul", [shares, values])
    apart = writer.node("Reshape", [mixed, writer.integers(0, shape.heads, -1, shape.head_size)])
    back = writer.node("Transpose", [apart], perm=[0, 2, 1, 3])
    return writer.node("Reshape", [back, writer.integers(0, 0, shape.heads * shape.head_size)])


def _heads(writer: Writer, values: str, heads: int, size: int) -> str:
    return writer.node("Reshape", [values, writer.integers(0, 0, heads, size)])


def _rotary(writer: Writer, shape: Shape) -> None:
    """`cosine` and `sine` [B,T,1,D] of the positions' angles (Su et al., RoFormer, arXiv 2104.09864)."""
    frequencies = shape.theta ** (-np.arange(0, shape.head_size, 2, dtype=np.float32) / shape.head_size)
    places = writer.node("Cast", ["positions"], to=TensorProto.FLOAT)
    column = writer.node("Unsqueeze", [places, writer.integers(2, 3)])
    angles = writer.node("Mul", [column, writer.constant("frequencies", frequencies)])
    both = writer.node("Concat", [angles, angles], axis=-1)
    writer.node("Cos", [both], "cosine")
    # Against the halves changed over, the first of which counts negative.
    signs = np.repeat(np.array([-1, 1], np.float32), shape.head_size // 2)
    writer.node("Mul", [writer.node("Sin", [both]), writer.constant("signs", signs)], "sine")


def _rotated(writer: Writer, vectors: str, size: int) -> str:
    """vectors [B,T,heads,D]; the first half's values are paired with the second's."""
    first, second = writer.split(vectors, size // 2, size // 2, axis=-1)
    crossed = writer.node("Concat", [second, first], axis=-1)
    straight = writer.node("Mul", [vectors, "cosine"])
    return writer.node("Add", [straight, writer.node("Mul", [crossed, "sine"])])


def _interface(shape: Shape, layers: int, *, ids: bool) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    rest = [layers, 2, shape.kv_heads, shape.head_size]
    first = _tensor("ids", ["batch", "tokens"], TensorProto.INT64)
    if not ids:
        first = _tensor("hidden", ["batch", "tokens", shape.width])
    inputs = [
        first,
        _tensor("past", ["batch", "before", *rest]),
        _tensor("positions", ["batch", "tokens"], TensorProto.INT64),
        _tensor("bias", ["batch", 1, "tokens", "all"]),
    ]
    outputs = [_tensor("result", ["batch", "tokens", shape.width]), _tensor("present", ["batch", "tokens", *rest])]
    return inputs, outputs


def _tensor(name: str, axes: list[str | int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, axes)
