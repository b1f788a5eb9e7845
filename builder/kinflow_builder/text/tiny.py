"""A bundle of a random language model, made in seconds without torch: for tests of everything that runs bundles.

Six layers, width 64, a token per byte. Random branches would agree with the model hardly ever: layers add the less the
higher they are, so that exits agree often, and the members of this family resemble those of a trained one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kinflow.text.family import TextFamily
from kinflow_builder.bundle import staged
from kinflow_builder.text import cut as cuts
from kinflow_builder.text.bundle import About, write_graphs, write_manifest
from kinflow_builder.text.cut import Cut
from kinflow_builder.text.figures import Figures, Graphs, Promise, Samples, greedy, measure
from kinflow_builder.text.shape import Floats, Model, Shape, Texts, Weights
from kinflow_builder.text.shortlist import fit
from kinflow_builder.text.tokenizer import byte_level

SHAPE = Shape(
    vocabulary=259,
    width=64,
    layers=6,
    heads=4,
    kv_heads=2,
    head_size=16,
    inner=128,
    context=512,
    theta=1e4,
    epsilon=1e-5,
)
CUT = Cut(s1=2, s2=4, device_layers=1, edge_layers=1)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a layer adds, by its number.
SIZES = (2.0, 2.0, 0.8, 0.6, 0.5, 0.4)


def write_tiny(folder: Path, seed: int = 0) -> Figures:
    """The bundle, into `folder`; what was measured of it."""
    model = random_model(seed)
    about = About("tiny", "1.0.0", "A random model for tests", "Apache-2.0", SHAPE.context)
    with staged(folder, TextFamily.load) as stage:
        sketch = fit(np.random.default_rng(seed).normal(size=(4096, SHAPE.width)).astype(np.float32), model.head)
        listed = write_graphs(stage, model, CUT, cuts.untrained(model, CUT), sketch, done=lambda _: None)
        graphs, exact = Graphs(stage, "int8"), Graphs(stage, "float")
        prompts = np.random.default_rng(seed).integers(len(SPECIAL), SHAPE.vocabulary, (16, 8))
        own = greedy(exact, prompts, 64)
        chosen = np.arange(own.shape[1]) >= np.full((len(own), 1), prompts.shape[1])
        samples = Samples(own, chosen, own, "random bytes", "its own texts")
        figures = measure(graphs, exact, samples, Promise(0.05, 0.05))
        write_manifest(stage, about, model, CUT, Texts(tokenizer(), TEMPLATE, [2]), listed, figures)
    return figures


def tokenizer() -> bytes:
    """tokenizer.json with a token for every byte after the special ones."""
    from tokenizers import pre_tokenizers

    return byte_level([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())], [], SPECIAL)


def random_model(seed: int) -> Model:
    """Its texts do not repeat themselves soon; letters are likelier than other bytes."""
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int, size: float = 1.0) -> Floats:
        return np.asarray(random.normal(scale=size / inputs**0.5, size=(outputs, inputs)), np.float32)

    def layer(size: float) -> Weights:
        width, inner = SHAPE.width, SHAPE.inner
        queries, keys = SHAPE.heads * SHAPE.head_size, SHAPE.kv_heads * SHAPE.head_size
        return {
            "attention_norm": np.ones(width, np.float32),
            "query": matrix(queries, width, 2.0),
            "key": matrix(keys, width, 2.0),
            "value": matrix(keys, width),
            "output": matrix(width, queries, 2 * size),
            "mlp_norm": np.ones(width, np.float32),
            "gate": matrix(inner, width),
            "up": matrix(inner, width),
            "down": matrix(width, inner, 2 * size),
        }

    embedding = np.asarray(random.normal(scale=0.35, size=(SHAPE.vocabulary, SHAPE.width)), np.float32)
    embedding[_unlikely()] *= 0.3
    layers = [layer(size) for size in SIZES]
    return Model(SHAPE, embedding, layers, np.ones(SHAPE.width, np.float32), embedding)


def _unlikely() -> Floats:
    """Of each token: it is special or no letter."""
    import json

    tokens = json.loads(tokenizer())["model"]["vocab"]
    plain = {number for token, number in tokens.items() if len(token) == 1 and token.isascii() and token.isalpha()}
    return np.array([number not in plain for number in range(SHAPE.vocabulary)])
