"""Attention in a graph, in two forms: operator by operator, and as onnxruntime's one node.

Apart, with one tensor for all layers' past, sessions of different lengths can be one batch: servers' graphs. Fused,
each layer's keys and values stay where they are and are only added to: a device's, which has one text at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from kinflow_builder.text.shape import Shape

if TYPE_CHECKING:
    from kinflow_builder.text.graph import Writer

CONTRIB = "com.microsoft"


class Attention(Protocol):
    """What the layers of one segment share."""

    inputs: list[onnx.ValueInfoProto]
    """Of the graph, beside its first."""
    outputs: list[onnx.ValueInfoProto]
    """Of the graph, beside `result`."""

    def mix(self, index: int, joined: str) -> str:
        """joined [B,T,(heads + 2H)*D], scaled queries, keys and values -> [B,T,heads*D], of layer `index`."""

    def end(self) -> None:
        """After the last layer."""


def tensor(name: str, axes: list[str | int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, axes)


class Apart:
    """Inputs `past` [B,P,L,2,H,D], `positions` [B,T], `bias` [B,1,T,P+T]; output `present` [B,T,L,2,H,D], new."""

    def __init__(self, writer: Writer, shape: Shape, layers: int) -> None:
        self._writer, self._shape, self._layers = writer, shape, layers
        self._presents: list[str] = []
        rest: list[str | int] = [layers, 2, shape.kv_heads, shape.head_size]
        self.inputs = [
            tensor("past", ["batch", "before", *rest]),
            tensor("positions", ["batch", "tokens"], TensorProto.INT64),
            tensor("bias", ["batch", 1, "tokens", "all"]),
        ]
        self.outputs = [tensor("present", ["batch", "tokens", *rest])]
        writer.node("Reshape", ["past", writer.integers(0, 0, 2 * layers, shape.kv_heads, shape.head_size)], "flat")
        # [2L,B,H,P,D]: what one layer takes lies in one piece.
        writer.node("Transpose", ["flat"], "caches", perm=[2, 0, 3, 1, 4])
        self._rotary()
        # The queries that share a key stand one behind another, so that no key is copied; the mask is repeated.
        writer.node("Concat", ["bias"] * (shape.heads // shape.kv_heads), "mask", axis=2)

    def mix(self, index: int, joined: str) -> str:
        writer, shape = self._writer, self._shape
        size, heads, kv_heads = shape.head_size, shape.heads, shape.kv_heads
        all_heads = writer.node("Reshape", [joined, writer.integers(0, 0, heads + 2 * kv_heads, size)])
        turning, value = writer.split(all_heads, heads + kv_heads, kv_heads, axis=2)
        query, key = writer.split(self._rotated(turning, size), heads, kv_heads, axis=2)
        for part in (key, value):
            self._presents.append(writer.node("Unsqueeze", [part, writer.integers(2)]))
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
        return self._attend(query, keys, values)

    def end(self) -> None:
        writer, shape = self._writer, self._shape
        joined = writer.node("Concat", self._presents, axis=2)
        sizes = writer.integers(0, 0, self._layers, 2, shape.kv_heads, shape.head_size)
        writer.node("Reshape", [joined, sizes], "present")

    def _attend(self, query: str, keys: str, values: str) -> str:
        """query [B,T,heads,D]; keys and values [B,H,S,D] -> [B,T,heads*D]"""
        writer, shape = self._writer, self._shape
        turned = writer.node("Transpose", [query], perm=[0, 2, 1, 3])
        grouped = writer.node("Reshape", [turned, writer.integers(0, shape.kv_heads, -1, shape.head_size)])
        scores = writer.node("MatMul", [grouped, writer.node("Transpose", [keys], perm=[0, 1, 3, 2])])
        shares = writer.node("Softmax", [writer.node("Add", [scores, "mask"])], axis=-1)
        mixed = writer.node("MatMul", [shares, values])
        apart = writer.node("Reshape", [mixed, writer.integers(0, shape.heads, -1, shape.head_size)])
        back = writer.node("Transpose", [apart], perm=[0, 2, 1, 3])
        return writer.node("Reshape", [back, writer.integers(0, 0, shape.heads * shape.head_size)])

    def _rotary(self) -> None:
        """`cosine` and `sine` [B,T,1,D] of the positions' angles (Su et al., RoFormer, arXiv 2104.09864)."""
        writer, shape = self._writer, self._shape
        places = writer.node("Cast", ["positions"], to=TensorProto.FLOAT)
        column = writer.node("Unsqueeze", [places, writer.integers(2, 3)])
        angles = writer.node("Mul", [column, writer.constant("frequencies", frequencies(shape))])
        both = writer.node("Concat", [angles, angles], axis=-1)
        writer.node("Cos", [both], "cosine")
        # Against the halves changed over, the first of which counts negative.
        signs = np.repeat(np.array([-1, 1], np.float32), shape.head_size // 2)
        writer.node("Mul", [writer.node("Sin", [both]), writer.constant("signs", signs)], "sine")

    def _rotated(self, vectors: str, size: int) -> str:
        """vectors [B,T,heads,D]; the first half's values are paired with the second's."""
        writer = self._writer
        first, second = writer.split(vectors, size // 2, size // 2, axis=-1)
        crossed = writer.node("Concat", [second, first], axis=-1)
        straight = writer.node("Mul", [vectors, "cosine"])
        return writer.node("Add", [straight, writer.node("Mul", [crossed, "sine"])])


class Fused:
    """Inputs `key.0.past` [B,H,P,D], `value.0.past` and so on, `last` [B], the last position of each text, and `total`
    [1], positions in all; outputs `key.0` [B,H,P+T,D], `value.0` and so on.

    An output that is given its input's memory, P of it, is written behind what is there.
    """

    def __init__(self, writer: Writer, shape: Shape, layers: int) -> None:
        self._writer, self._shape = writer, shape
        names = [f"{kind}.{index}" for index in range(layers) for kind in ("key", "value")]
        rest: list[str | int] = ["batch", shape.kv_heads]
        self.inputs = [tensor(f"{name}.past", [*rest, "before", shape.head_size]) for name in names]
        self.inputs += [tensor("last", ["batch"], TensorProto.INT32), tensor("total", [1], TensorProto.INT32)]
        self.outputs = [tensor(name, [*rest, "all", shape.head_size]) for name in names]
        angles = np.arange(shape.context, dtype=np.float32)[:, None] * frequencies(shape)
        writer.constant("cosine", np.cos(angles))
        writer.constant("sine", np.sin(angles))

    def mix(self, index: int, joined: str) -> str:
        key, value, mixed = f"key.{index}", f"value.{index}", f"mixed.{index}"
        inputs = [joined, "", "", f"{key}.past", f"{value}.past", "last", "total", "cosine", "sine"]
        # Queries come scaled.
        sizes = {"num_heads": self._shape.heads, "kv_num_heads": self._shape.kv_heads, "do_rotary": 1, "scale": 1.0}
        self._writer.nodes.append(
            helper.make_node("GroupQueryAttention", inputs, [mixed, key, value], name=mixed, domain=CONTRIB, **sizes)
        )
        return mixed

    def end(self) -> None:
        pass


def frequencies(shape: Shape) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """[D/2], radians a position."""
    places = np.arange(0, shape.head_size, 2, dtype=np.float32) / shape.head_size
    return np.asarray(shape.theta**-places, np.float32)
