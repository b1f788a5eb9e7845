"""Language models are read as they are published: GGUF and Hugging Face folders, weights, tokenizer and template."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kinflow.errors import InputError
from kinflow.text.tokenizer import Tokenizer
from kinflow_builder.text import gguf, huggingface
from kinflow_builder.text.shape import Model
from kinflow_builder.text.tiny import SHAPE, random_model
from tiny_llama import permuted, write_gguf, write_huggingface

pytestmark = [
    pytest.mark.builder,
    pytest.mark.skipif(find_spec("gguf") is None, reason="pip install 'kinflow[builder]'"),
    pytest.mark.skipif(find_spec("safetensors") is None, reason="pip install 'kinflow[builder]'"),
]

MODEL = random_model(0)


def assert_same(found: Model) -> None:
    """All of `found` is the random model's."""
    np.testing.assert_array_equal(found.embedding, MODEL.embedding)
    np.testing.assert_array_equal(found.norm, MODEL.norm)
    assert found.head is found.embedding
    for ours, theirs in zip(found.layers, MODEL.layers, strict=True):
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_gguf_rows_of_query_and_key_go_back(tmp_path: Path) -> None:
    """What a converter interleaves is read as it was; everything else is read unchanged."""
    write_gguf(tmp_path / "model.gguf", MODEL)
    found, texts = gguf.read(tmp_path / "model.gguf")
    assert_same(found)
    assert (found.shape.heads, found.shape.kv_heads, found.shape.head_size) == (4, 2, 16)
    assert found.shape.epsilon == pytest.approx(SHAPE.epsilon)
    # The first special token ends texts that were never conversations.
    assert texts.stop_tokens == [0, 2]


def test_unpermuted_is_the_inverse() -> None:
    """Row by row it undoes what converters do, which is not nothing."""
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    assert not np.array_equal(permuted(weight, 4), weight)
    np.testing.assert_array_equal(gguf.unpermuted(permuted(weight, 4), 4), weight)


def test_gguf_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    """Merges, digits one by one, special tokens, and any bytes there and back."""
    write_gguf(tmp_path / "model.gguf", MODEL)
    texts = gguf.read(tmp_path / "model.gguf")[1]
    tokenizer = Tokenizer(texts.tokenizer, texts.chat_template.encode(), texts.stop_tokens)
    for text in ("In 1984, naïve 漢字 🙂!\n\n\tx = 10", "  spaces   ", "'tis they'll"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat([{"role": "user", "content": "h"}])[0] == 1
    assert tokenizer.encode("<|im_end|>") == [2]
    assert len(tokenizer.encode("he")) == 1


def test_gguf_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Neither a tokenizer of other rules nor a file of other bytes gets through."""
    write_gguf(tmp_path / "other.gguf", MODEL, pre_tokenizer="llama-bpe")
    with pytest.raises(InputError, match="llama-bpe"):
        gguf.read(tmp_path / "other.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(InputError, match=r"broken\.gguf is no GGUF file"):
        gguf.read(tmp_path / "broken.gguf")


def test_huggingface_folder(tmp_path: Path) -> None:
    """Weights by their names there, sizes from config.json, tokenizer and template from their files."""
    write_huggingface(tmp_path / "model", MODEL)
    found, texts = huggingface.read(tmp_path / "model")
    assert found.shape == SHAPE
    assert_same(found)
    assert texts.stop_tokens == [2]
    assert "im_start" in texts.chat_template


def test_bfloat16_is_exact() -> None:
    """The 16 bits are the upper half of the float's, negative and tiny ones too."""
    values = np.array([1.5, -2.0, 3.0e-39, 65536.0], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(huggingface._floats("BF16", upper.tobytes()), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("rope_scaling", {"factor": 8}, "rope_scaling is"),
        ("eos_token_id", None, "eos_token_id"),
        ("num_hidden_layers", 7, r"nothing is called 'model\.layers\.6"),
    ],
)
def test_huggingface_folder_of_another_kind_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    """What the graphs would compute otherwise, or what is not there, is named."""
    write_huggingface(tmp_path, MODEL)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=message):
        huggingface.read(tmp_path)
