"""Reads a Llama-style model, its tokenizer and its chat template from one GGUF file.

Converters write the rows of query and key so that rotary pairs are neighbours; here, as in the graphs, the first half
of a head is paired with the second: the rows go back.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kinflow.errors import InputError
from kinflow_builder.text.shape import Floats, Model, Shape, Texts
from kinflow_builder.text.tokenizer import byte_level

if TYPE_CHECKING:
    from gguf import GGUFReader

NAMES = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
# The tokenizers whose rules byte_level follows.
PRE_TOKENIZERS = ("smollm",)
# llama.cpp's kinds of tokens: control ones are no text.
CONTROL, USER_DEFINED = 3, 4
END_OF_TEXT = "<|endoftext|>"


def read(path: Path) -> tuple[Model, Texts]:
    """Weights exactly as llama.cpp dequantises them. Raises InputError for a file of another kind."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as exc:
        raise InputError(f"{path} is no GGUF file: {exc}") from exc
    if _value(reader, "general.architecture") != "llama":
        raise InputError(f"{path} has the architecture {_value(reader, 'general.architecture')!r}, expected 'llama'")
    return _model(reader), _texts(reader, path)


def _model(reader: GGUFReader) -> Model:
    from gguf import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}

    def tensor(name: str) -> Floats:
        found = stored[f"{name}.weight"]
        return np.asarray(dequantize(found.data, found.tensor_type), np.float32)

    embedding = tensor("token_embd")
    shape = _shape(reader, embedding)
    layers = []
    for number in range(shape.layers):
        weights = {name: tensor(f"blk.{number}.{theirs}") for name, theirs in NAMES.items()}
        weights["query"] = unpermuted(weights["query"], shape.heads)
        weights["key"] = unpermuted(weights["key"], shape.kv_heads)
        layers.append(weights)
    head = tensor("output") if "output.weight" in stored else embedding
    return Model(shape, embedding, layers, tensor("output_norm"), head)


def _shape(reader: GGUFReader, embedding: Floats) -> Shape:
    def number(name: str) -> Any:
        return _value(reader, f"llama.{name}")

    heads, width = int(number("attention.head_count")), embedding.shape[1]
    return Shape(
        vocabulary=len(embedding),
        width=width,
        layers=int(number("block_count")),
        heads=heads,
        kv_heads=int(number("attention.head_count_kv")),
        head_size=width // heads,
        inner=int(number("feed_forward_length")),
        context=int(number("context_length")),
        theta=float(number("rope.freq_base")),
        epsilon=float(number("attention.layer_norm_rms_epsilon")),
    )


def unpermuted(weight: Floats, heads: int) -> Floats:
    """weight [heads*D, width] with rotary pairs as neighbours -> halves."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def _texts(reader: GGUFReader, path: Path) -> Texts:
    kind = _value(reader, "tokenizer.ggml.pre")
    if _value(reader, "tokenizer.ggml.model") != "gpt2" or kind not in PRE_TOKENIZERS:
        raise InputError(f"{path} has a tokenizer of kind {kind!r}, expected one of {', '.join(PRE_TOKENIZERS)}")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    made = byte_level(tokens, _value(reader, "tokenizer.ggml.merges"), special)
    # Conversations end with the one, texts that were never conversations with the other.
    stop = {int(_value(reader, "tokenizer.ggml.eos_token_id")), *(i for i, t in enumerate(tokens) if t == END_OF_TEXT)}
    return Texts(made, str(_value(reader, "tokenizer.chat_template")), sorted(stop))


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise InputError(f"the GGUF file has no field {name}")
    return field.contents()
