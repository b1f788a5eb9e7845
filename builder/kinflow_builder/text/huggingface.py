"""Reads a Llama-style model from a folder as Hugging Face publishes them: config.json and safetensors, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kinflow.errors import InputError
from kinflow_builder.text.shape import Floats, Model, Shape, Texts

NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# What these would change is not in our graphs.
UNSUPPORTED = ("rope_scaling", "attention_bias", "mlp_bias", "sliding_window")


def read(folder: Path) -> tuple[Model, Texts]:
    """Raises InputError for a folder without such a model, or one that computes something else."""
    config = _json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise InputError(f"{folder}/config.json: model_type is {config.get('model_type')!r}, expected 'llama'")
    for key in UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{folder}/config.json: {key} is {config[key]!r}, only models without it can be cut")
    try:
        return _model(config, _tensors(folder)), _texts(folder, config)
    except KeyError as exc:
        raise InputError(f"{folder}: nothing is called {exc}") from exc


def _model(config: dict[str, Any], stored: dict[str, Floats]) -> Model:
    heads = config["num_attention_heads"]
    shape = Shape(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        inner=config["intermediate_size"],
        context=config["max_position_embeddings"],
        # Newer versions of the library write it into a table of its own.
        theta=float(config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10_000.0)),
        epsilon=config["rms_norm_eps"],
    )
    layers = [
        {name: stored[f"model.layers.{number}.{theirs}.weight"] for name, theirs in NAMES.items()}
        for number in range(shape.layers)
    ]
    embedding = stored["model.embed_tokens.weight"]
    head = embedding if config.get("tie_word_embeddings") else stored["lm_head.weight"]
    return Model(shape, embedding, layers, stored["model.norm.weight"], head)


def _tensors(folder: Path) -> dict[str, Floats]:
    """float32, from all of the folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors file")
    found: dict[str, Floats] = {}
    for file in files:
        found.update(_tensors_of(file))
    return found


def _tensors_of(file: Path) -> dict[str, Floats]:
    from safetensors import SafetensorError, deserialize

    read: Any = deserialize  # without types of its own
    try:
        parts = read(file.read_bytes())
    except SafetensorError as exc:
        raise InputError(f"{file}: {exc}") from exc
    return {name: _floats(part["dtype"], bytes(part["data"])).reshape(part["shape"]) for name, part in parts}


def _floats(dtype: str, data: bytes) -> Floats:
    if dtype == "BF16":
        # The upper half of a float32; numpy has no such type.
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    if dtype not in kinds:
        raise InputError(f"weights of type {dtype}, expected BF16, {', '.join(kinds)}")
    return np.frombuffer(data, kinds[dtype]).astype(np.float32)


def _texts(folder: Path, config: dict[str, Any]) -> Texts:
    try:
        tokenizer = (folder / "tokenizer.json").read_bytes()
    except OSError as exc:
        raise InputError(f"{folder}/tokenizer.json: {exc.strerror}") from exc
    separate = folder / "chat_template.jinja"
    template = separate.read_text("utf-8") if separate.is_file() else None
    if template is None:
        template = _json(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise InputError(f"{folder} has no chat template: expected chat_template.jinja")
    stop = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        stop = _json(generation).get("eos_token_id", stop)
    if stop is None:
        raise InputError(f"{folder}/config.json has no eos_token_id: nothing would end a text")
    return Texts(tokenizer, template, [stop] if isinstance(stop, int) else list(stop))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as exc:
        raise InputError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise InputError(f"{path}: {exc}") from exc
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object")
    return found
