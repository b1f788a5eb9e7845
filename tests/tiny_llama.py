"""The random model of `kinflow_builder.text.tiny` in the formats that real ones come in, and a recipe for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kinflow_builder.text.huggingface import NAMES
from kinflow_builder.text.shape import Floats, Model
from kinflow_builder.text.tiny import SPECIAL, TEMPLATE, tokenizer

RECIPE = """
id = "tiny"
version = "1.0.0"
title = "A random model"
license = "Apache-2.0"
context = 256
model = {{ kind = "huggingface", directory = {directory!r} }}
cut = {{ s1 = 2, s2 = 4, device_layers = 1, edge_layers = 1 }}
training = {{ epochs = {epochs}, texts = 4, learning_rate = 3e-4, hidden_weight = 0.3, seed = 0, threads = 1 }}
check = {{ texts = 8, tokens = 96, written_tokens = 256, epsilon = 0.05, delta = 0.05 }}

[corpus]
batches = 2
texts = 32
tokens = 80
temperature = 0.8
openings = ["How", "Why"]
"""


def write_recipe(folder: Path, model: Path, epochs: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.format(directory=str(model), epochs=epochs))


def write_huggingface(folder: Path, model: Model) -> None:
    """As `save_pretrained` writes it, in float32."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    shape = model.shape
    config = {
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.theta,
        "rms_norm_eps": shape.epsilon,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    values = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    for number, layer in enumerate(model.layers):
        values |= {f"model.layers.{number}.{theirs}.weight": layer[ours] for ours, theirs in NAMES.items()}
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(tokenizer())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def write_gguf(path: Path, model: Model, pre_tokenizer: str = "smollm") -> None:
    """As llama.cpp's converter writes it, in float32."""
    from gguf import GGUFWriter

    from kinflow_builder.text.gguf import CONTROL
    from kinflow_builder.text.gguf import NAMES as THEIRS

    shape = model.shape
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    vocabulary = json.loads(tokenizer())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    # A pair of letters in the place of the byte 255, which no text has.
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list(["he" if token == "ÿ" else token for token in tokens])
    writer.add_token_types([CONTROL if number < len(SPECIAL) else 1 for number in range(shape.vocabulary)])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", model.embedding)
    writer.add_tensor("output_norm.weight", model.norm)
    for number, layer in enumerate(model.layers):
        for ours, theirs in THEIRS.items():
            heads = {"query": shape.heads, "key": shape.kv_heads}.get(ours)
            values = layer[ours] if heads is None else permuted(layer[ours], heads)
            writer.add_tensor(f"blk.{number}.{theirs}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: Floats, heads: int) -> Floats:
    """Row r of a head's first half goes to 2r, of its second half to 2r + 1: rotary pairs become neighbours."""
    size = len(weight) // heads
    found = np.empty_like(weight)
    for head in range(heads):
        for row in range(size // 2):
            found[head * size + 2 * row] = weight[head * size + row]
            found[head * size + 2 * row + 1] = weight[head * size + size // 2 + row]
    return found
