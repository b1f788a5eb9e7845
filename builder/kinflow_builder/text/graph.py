"""ONNX graphs of segments, written operator by operator from numpy weights; no torch.

Inputs: `ids` or `hidden`, and what attention takes; outputs `result` [B,T,d], and what attention adds to its caches.
B, T and the past's length P are free, P = 0 too. Float graphs have attention apart, int8 ones, which are a device's,
have it fused. The head: `hidden` [N,d] -> `logits` [N,V]. Keys stand in the cache after their rotation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kinflow.text.manifest import Precision
from kinflow_builder.text.attention import CONTRIB, Apart, Attention, Fused, tensor
from kinflow_builder.text.blocks import BLOCK, FourBits, eight_bits, four_bits, rough
from kinflow_builder.text.shape import Bridge, Floats, Shape, Weights
from kinflow_builder.text.shortlist import TOKENS, Sketch

OPSET = 20
IR_VERSION = 9
# Stands for 0.0 among levels of 8 bits.
ZERO = 128
# onnxruntime's: activations are rounded to 8 bits too, block by block.
INT8_ARITHMETIC = 4


class Writer:
    """Nodes and constants of a graph as it grows. Every method that computes returns the name of what it made.

    With the precision int8 every matrix has 8 bits, or 4 where those are enough, and a scale for each block of 32
    values, and what it is applied to is rounded to 8 bits the same way, token by token: what else is in a batch changes
    nothing.
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
        """values [B,T,inputs], weight [outputs, inputs]"""
        if self.precision == "float":
            return self.node("MatMul", [values, self.constant(name, weight.T)])
        packed, width = four_bits(weight), weight.shape[1]
        if packed is None:
            return self.in_eight_bits(values, name, weight)
        blocks = self.node("Reshape", [values, self.integers(0, 0, width // BLOCK, BLOCK)])
        sums = self.node("ReduceSum", [blocks, self.integers(-1)], keepdims=0)
        values = self.node("Concat", [values, sums], axis=-1)
        return self.in_four_bits(values, name, packed, width + width // BLOCK)

    def in_four_bits(self, values: str, name: str, packed: FourBits, width: int) -> str:
        """The product with a matrix of so many inputs."""
        stored = [self.constant(f"{name}.levels", packed.levels, np.uint8)]
        stored += [self.constant(f"{name}.scale", packed.scale), self.constant(f"{name}.zero", packed.zero, np.uint8)]
        return self._product(values, stored, bits=4, K=width, N=len(packed.scale))

    def in_eight_bits(self, values: str, name: str, weight: Floats) -> str:
        levels, scale = eight_bits(weight)
        # Levels are stored from 0 on.
        stored = [self.constant(f"{name}.levels", levels.astype(np.int16) + ZERO, np.uint8)]
        stored += [self.constant(f"{name}.scale", scale[:, :, 0])]
        return self._product(values, stored, bits=8, K=weight.shape[1], N=len(weight))

    def _product(self, values: str, stored: list[str], **sizes: int) -> str:
        made: dict[str, Any] = {"block_size": BLOCK, "accuracy_level": INT8_ARITHMETIC, **sizes}
        return self.node("MatMulNBits", [values, *stored], domain=CONTRIB, **made)

    def rows(self, name: str, table: Floats, ids: str) -> str:
        """Those rows of a table [count, width] that ids name."""
        if self.precision == "float":
            return self.node("Gather", [self.constant(name, table), ids])
        count, width = table.shape
        levels, scale = eight_bits(table)
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

    def beside(self) -> Writer:
        """For a part that may be left out; all parts share their constants."""
        other = Writer(self.precision)
        other.constants = self.constants
        return other

    def part(self, name: str, outputs: list[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """The nodes so far."""
        return helper.make_graph(self.nodes, name, [], outputs)

    def model(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "segment", inputs, outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kinflow")
        onnx.checker.check_model(made)
        return made


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
    attention: Attention = (Fused if precision == "int8" else Apart)(writer, shape, len(layers))
    first = tensor("hidden", ["batch", "tokens", shape.width])
    if embedding is not None:
        first = tensor("ids", ["batch", "tokens"], TensorProto.INT64)
    hidden = "hidden" if embedding is None else writer.rows("embedding", embedding, "ids")
    if bridge is not None:
        # Always as floats: no norm stands before it, and few channels are a hundred times as large as their neighbours.
        turned = writer.node("MatMul", [hidden, writer.constant("bridge", bridge.weight.T)])
        hidden = writer.node("Add", [turned, writer.constant("bridge.bias", bridge.bias)])
    normed = writer.norm(hidden, "0.attention_norm", layers[0]["attention_norm"], shape.epsilon)
    for index, weights in enumerate(layers):
        mixed = _attention(writer, shape, index, weights, normed, attention)
        hidden, normed = writer.added_and_normed(hidden, mixed, f"{index}.mlp_norm", weights["mlp_norm"], shape.epsilon)
        opened = _mlp(writer, shape, index, weights, normed)
        # What comes next takes it normed: the next layer, or what is behind the segment.
        following = layers[index + 1]["attention_norm"] if index + 1 < len(layers) else norm
        if following is None:
            hidden = writer.node("Add", [hidden, opened])
        else:
            hidden, normed = writer.added_and_normed(hidden, opened, f"{index}.next_norm", following, shape.epsilon)
    attention.end()
    writer.node("Identity", [hidden if norm is None else normed], "result")
    outputs = [tensor("result", ["batch", "tokens", shape.width]), *attention.outputs]
    return writer.model([first, *attention.inputs], outputs)


def head(weight: Floats, precision: Precision = "float", sketch: Sketch | None = None) -> onnx.ModelProto:
    """weight [vocabulary, width]; `hidden` [N,d] -> `logits` [N,V].

    With a sketch, an int8 head: `hidden` and `all` (bool, a scalar) -> `tokens` [N,K], int64, and their `logits` [N,K]:
    all tokens, or for much less work the likeliest, nearly always.
    """
    writer = Writer(precision)
    vocabulary, width = weight.shape
    hidden = tensor("hidden", ["rows", width])
    if precision == "float" or sketch is None:
        made = writer.in_eight_bits if precision == "int8" else writer.linear
        writer.node("Identity", [made("hidden", "head", weight)], "logits")
        return writer.model([hidden], [tensor("logits", ["rows", vocabulary])])
    outputs = [tensor("tokens", ["rows", "listed"], TensorProto.INT64), tensor("logits", ["rows", "listed"])]
    every, some = writer.beside(), writer.beside()
    every.node("Identity", [every.in_eight_bits("hidden", "head", weight)], "logits")
    every.node("Identity", [every.constant("every", np.arange(vocabulary)[None], np.int64)], "tokens")
    _shortlist(some, weight, sketch)
    branches = {"then_branch": every.part("all", outputs), "else_branch": some.part("likely", outputs)}
    writer.nodes.append(helper.make_node("If", ["all"], ["tokens", "logits"], name="head", **branches))
    return writer.model([hidden, tensor("all", [], TensorProto.BOOL)], outputs)


def _shortlist(writer: Writer, weight: Floats, sketch: Sketch) -> None:
    """`tokens` and `logits`, from `hidden` and what the head has stored."""
    vocabulary, width = weight.shape
    turned = writer.node("MatMul", ["hidden", writer.constant("down", sketch.down.T)])
    low = writer.node("Sub", [turned, writer.constant("middle", sketch.down @ sketch.centre)])
    rated = writer.in_four_bits(low, "up", rough(weight @ sketch.up), len(sketch.down))
    rated = writer.node("Add", [rated, writer.constant("usual", weight @ sketch.centre)])
    inputs = [rated, writer.integers(min(TOKENS, vocabulary // 4))]
    writer.nodes.append(helper.make_node("TopK", inputs, ["best", "tokens"], name="tokens", sorted=0))
    stored = writer.node("Cast", [writer.node("Gather", ["head.levels", "tokens"])], to=TensorProto.FLOAT)
    levels = writer.node("Sub", [stored, writer.constant("zero", ZERO)])
    scales = writer.node("Unsqueeze", [writer.node("Gather", ["head.scale", "tokens"]), writer.integers(-1)])
    rows = writer.node("Reshape", [writer.node("Mul", [levels, scales]), writer.integers(0, 0, width)])
    product = writer.node("MatMul", [rows, writer.node("Unsqueeze", ["hidden", writer.integers(-1)])])
    writer.node("Squeeze", [product, writer.integers(-1)], "logits")


def _attention(writer: Writer, shape: Shape, index: int, weights: Weights, normed: str, attention: Attention) -> str:
    """What a layer's attention adds. Nodes cost time, even small ones: one product makes queries, keys and values."""
    scaled = weights["query"] * np.float32(shape.head_size**-0.5)
    joined = writer.linear(normed, f"{index}.joined", np.concatenate([scaled, weights["key"], weights["value"]]))
    return writer.linear(attention.mix(index, joined), f"{index}.output", weights["output"])


def _mlp(writer: Writer, shape: Shape, index: int, weights: Weights, normed: str) -> str:
    """What a layer's MLP adds."""
    both = writer.linear(normed, f"{index}.gate_up", np.concatenate([weights["gate"], weights["up"]]))
    gate, up = writer.split(both, shape.inner, shape.inner, axis=-1)
    opened = writer.node("Mul", [gate, writer.node("Sigmoid", [gate])])
    return writer.linear(writer.node("Mul", [opened, up]), f"{index}.down", weights["down"])
