"""Stores a float graph's weights as 8-bit or 6-bit integers, a scale per output channel; the arithmetic stays float.

The graph turns them back itself, with operations that onnxruntime folds once, at load. (It does not fold
DequantizeLinear: each inference would pay for it.) A quarter of the size or less, and no loss of speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Floats = npt.NDArray[np.float32]

# Smaller tensors (biases) are not worth the nodes.
MIN_VALUES = 256
# Where a value sums up few products, 6 bits cost accuracy; the last layers hold most weights and sum up many.
MIN_VALUES_6 = 300_000
# The axis of the output channels in each kind of node's second input.
_AXES = {"Conv": 0, "Gemm": 0, "MatMul": 1, "ConvTranspose": 1}


def store_weights(path: Path, bits: Literal[6, 8]) -> None:
    """Rewrites the ONNX graph at `path`: weights of Conv, ConvTranspose, Gemm and MatMul nodes, symmetric.

    6 bits: of large matrices, all others get 8.
    """
    model = onnx.load(path)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    axes = {node.input[1]: _axis(node) for node in graph.node if node.op_type in _AXES}
    restored: list[onnx.NodeProto] = []
    for name, axis in axes.items():
        tensor = weights.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < MIN_VALUES:
            continue
        # Four levels of 6 bits make three bytes.
        chosen = 6 if bits == 6 and values.size >= MIN_VALUES_6 and values.size % 4 == 0 else 8
        levels, scale = quantise_weights(values, axis, chosen)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        if chosen == 6:
            graph.initializer.append(numpy_helper.from_array(packed(levels), f"{name}.packed"))
            graph.initializer.append(numpy_helper.from_array(np.array(values.shape, np.int64), f"{name}.shape"))
            restored += _unpacking(name)
        else:
            graph.initializer.append(numpy_helper.from_array(levels, f"{name}.int8"))
            restored.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.levels"], to=onnx.TensorProto.FLOAT))
        restored.append(helper.make_node("Mul", [f"{name}.levels", f"{name}.scale"], [name]))
    if bits == 6:
        graph.initializer.extend(_constants())
    save_with(model, restored, path)


def save_with(model: onnx.ModelProto, restored: Sequence[onnx.NodeProto], path: Path) -> None:
    """Nodes in front of all others, which make the weights of what is stored in fewer bits."""
    graph = model.graph
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*restored, *nodes])
    # What the exporter noted about the initializers' types is no longer so.
    changed = {node.output[0] for node in restored}
    notes = [note for note in graph.value_info if note.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(notes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def quantise_weights(values: Floats, axis: int, bits: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """Levels, -127…127 for 8 bits, and their scale along `axis` (all other axes 1): levels * scale is the nearest."""
    limit = (1 << (bits - 1)) - 1
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / limit, 1).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale


def packed(levels: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Levels of 6 bits -> uint8 [3, a quarter of them]: three quarters as low bits, the fourth in their high bits."""
    quarters = (levels.reshape(4, -1).astype(np.int16) + 32).astype(np.uint8)
    last = quarters[3]
    high = np.stack([last & 3, last >> 2 & 3, last >> 4])
    return np.asarray(quarters[:3] | high << 6, np.uint8)


def _unpacking(name: str) -> list[onnx.NodeProto]:
    """`packed`, backwards."""

    def node(kind: str, inputs: list[str], output: str, **attributes: int | str) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [f"{name}.{output}"], **attributes)

    to_float = {"to": onnx.TensorProto.FLOAT}
    return [
        node("BitwiseAnd", [f"{name}.packed", "weights6.mask"], "low"),
        node("BitShift", [f"{name}.packed", "weights6.shift"], "high", direction="RIGHT"),
        node("Cast", [f"{name}.low"], "first", **to_float),
        node("Cast", [f"{name}.high"], "parts", **to_float),
        # [1, 3] x [3, n]: the fourth quarter from its parts.
        node("MatMul", ["weights6.places", f"{name}.parts"], "fourth"),
        node("Concat", [f"{name}.first", f"{name}.fourth"], "all", axis=0),
        node("Sub", [f"{name}.all", "weights6.zero"], "centred"),
        node("Reshape", [f"{name}.centred", f"{name}.shape"], "levels"),
    ]


def _constants() -> list[onnx.TensorProto]:
    return [
        numpy_helper.from_array(np.array([63], np.uint8), "weights6.mask"),
        numpy_helper.from_array(np.array([6], np.uint8), "weights6.shift"),
        numpy_helper.from_array(np.array([[1, 4, 16]], np.float32), "weights6.places"),
        numpy_helper.from_array(np.array(32, np.float32), "weights6.zero"),
    ]


def _axis(node: onnx.NodeProto) -> int:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "Gemm" and not transposed else _AXES[node.op_type]
