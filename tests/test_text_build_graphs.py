"""A language model's graphs: what torch computes, with any past, alone or in a ragged batch, in floats and 8 bits."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")

import onnx

from kinflow.text.cache import stack
from kinflow.text.family import TextFamily
from kinflow.text.manifest import Precision
from kinflow_builder.text import graph
from kinflow_builder.text.bridge import fit
from kinflow_builder.text.llama import Llama, branch_of, layer_of, norm_of, stack_of
from kinflow_builder.text.llama import Stack as TorchStack
from kinflow_builder.text.shape import Branch, Bridge
from kinflow_builder.text.tiny import SHAPE, random_model, write_tiny

pytestmark = pytest.mark.builder

MODEL = random_model(0)
RANDOM = np.random.default_rng(0)


def run(made: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The graph's outputs."""
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def inputs_of(batch: int, past: int, tokens: int, layers: int) -> dict[str, np.ndarray]:
    """Random hidden values and cache, causal mask."""
    bias = np.triu(np.full((tokens, past + tokens), -1e9, np.float32), past + 1)
    return {
        "hidden": RANDOM.normal(size=(batch, tokens, SHAPE.width)).astype(np.float32),
        "past": RANDOM.normal(size=(batch, past, layers, 2, SHAPE.kv_heads, SHAPE.head_size)).astype(np.float32),
        "positions": np.tile(np.arange(past, past + tokens), (batch, 1)),
        "bias": np.tile(bias, (batch, 1, 1, 1)),
    }


def fused(inputs: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The same for a graph with fused attention."""
    past, positions = inputs["past"], inputs["positions"]
    given = {"hidden": inputs["hidden"], "last": positions[:, -1].astype(np.int32)}
    given["total"] = given["last"][:1] + 1
    for index in range(layers):
        for place, kind in enumerate(("key", "value")):
            given[f"{kind}.{index}.past"] = np.ascontiguousarray(past[:, :, index, place].swapaxes(1, 2))
    return given


def run_fused(made: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The result, and the new cache entries [B,T,L,2,H,D]."""
    layers = sum(output.name.startswith("key.") for output in made.graph.output)
    result, *caches = run(made, fused(inputs, layers))
    layered = [np.stack([caches[2 * index], caches[2 * index + 1]], 1) for index in range(layers)]
    # [B,L,2,H,P+T,D]
    return result, np.stack(layered, 1).transpose(0, 4, 1, 2, 3, 5)[:, inputs["past"].shape[1] :]


def torch_outputs(inputs: dict[str, np.ndarray], layers: int) -> list[np.ndarray]:
    """The same by the plain torch model: the last `layers` layers and the final norm."""
    chosen = [layer_of(SHAPE, weights) for weights in MODEL.layers[-layers:]]
    with torch.no_grad():
        found = TorchStack(SHAPE, chosen, norm_of(SHAPE, MODEL.norm))(*(torch.from_numpy(x) for x in inputs.values()))
    return [values.numpy() for values in found]


@pytest.mark.parametrize(("batch", "past", "tokens"), [(2, 3, 4), (1, 0, 5), (1, 7, 1), (3, 0, 1)])
def test_float_graph_is_what_torch_computes(batch: int, past: int, tokens: int) -> None:
    """Result and new cache entries are torch's to rounding, with a past and without."""
    inputs = inputs_of(batch, past, tokens, 2)
    found = run(graph.stack(SHAPE, MODEL.layers[-2:], MODEL.norm), inputs)
    for ours, theirs in zip(found, torch_outputs(inputs, 2), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_branch_is_what_torch_computes(precision: Precision) -> None:
    """The bridge comes before the layers, as floats in an int8 graph too."""
    weight = RANDOM.normal(size=(SHAPE.width, SHAPE.width)).astype(np.float32) / 8
    made = Branch(MODEL.layers[:1], MODEL.norm, Bridge(weight, RANDOM.normal(size=SHAPE.width).astype(np.float32)))
    inputs = inputs_of(1, 2, 3, 1)
    built = graph.stack(SHAPE, made.layers, made.norm, bridge=made.bridge, precision=precision)
    result = (run_fused if precision == "int8" else run)(built, inputs)[0]
    with torch.no_grad():
        expected = stack_of(SHAPE, made)(*(torch.from_numpy(values) for values in inputs.values()))
    assert isinstance(branch_of(stack_of(SHAPE, made)).bridge, Bridge)
    error = np.square(result - expected[0].numpy()).mean() ** 0.5
    assert error < (1e-5 if precision == "float" else 0.05)


def test_bridge_is_the_least_squares_map() -> None:
    """Of values that are a linear map of others plus noise the map is found, whatever a few outliers say."""
    given = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8.0) / 10
    wanted = given @ weight.T + bias
    given[:5] *= 1000
    found = fit(given, wanted)
    np.testing.assert_allclose(found.weight, weight.numpy(), atol=0.05)
    np.testing.assert_allclose(found.bias, bias.numpy(), atol=0.05)


@pytest.mark.parametrize(("batch", "past", "tokens"), [(2, 0, 6), (3, 5, 1), (1, 5, 6)])
def test_int8_graph_is_near(batch: int, past: int, tokens: int) -> None:
    """With 8 bits, and attention as one node, the result is a few hundredths off, and no more."""
    inputs = inputs_of(batch, past, tokens, 2)
    result, present = run_fused(graph.stack(SHAPE, MODEL.layers[-2:], MODEL.norm, precision="int8"), inputs)
    expected, cache = torch_outputs(inputs, 2)
    for ours, theirs in ((result, expected), (present, cache)):
        error = np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean())
        assert 1e-4 < error < 0.03


def test_int8_token_does_not_depend_on_its_batch() -> None:
    """In 8 bits too a token's features are the same beside a token of a hundred times its size."""
    made = graph.stack(SHAPE, MODEL.layers[:1], precision="int8")
    inputs = inputs_of(2, 3, 1, 1)
    inputs["hidden"][1] *= 100
    alone = run_fused(made, {name: values[:1] for name, values in inputs.items()})
    for both, one in zip(run_fused(made, inputs), alone, strict=True):
        np.testing.assert_allclose(both[:1], one, atol=1e-6)


def test_all_segments_are_the_whole_model() -> None:
    """lower, upper, top and head one behind another give the logits of the torch model on whole texts."""
    ids = RANDOM.integers(0, SHAPE.vocabulary, (2, 9))
    with torch.no_grad():
        expected = Llama(MODEL)(torch.from_numpy(ids)).numpy()
    values: np.ndarray = ids
    for begin, end in ((0, 2), (2, 4), (4, 6)):
        last = MODEL.norm if end == SHAPE.layers else None
        first = MODEL.embedding if begin == 0 else None
        inputs = inputs_of(2, 0, 9, 2)
        del inputs["hidden"]
        made = graph.stack(SHAPE, MODEL.layers[begin:end], last, first)
        values = run(made, {"ids" if begin == 0 else "hidden": values, **inputs})[0]
    logits = run(graph.head(MODEL.head), {"hidden": values.reshape(-1, SHAPE.width)})[0]
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)


def test_ragged_batch_is_one_by_one(tmp_path: Path) -> None:
    """Sessions of different lengths in one batch get what each gets alone."""
    write_tiny(tmp_path / "bundle")
    runner = TextFamily.load(tmp_path / "bundle").batched("lower")
    texts = [RANDOM.integers(0, SHAPE.vocabulary, (1, length)) for length in (3, 1, 8)]
    caches = [runner.past() for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        runner.run(text, [cache])
    following = RANDOM.integers(0, SHAPE.vocabulary, (3, 2))
    assert stack(caches, 2).past.shape[1] == 8
    alone = []
    for row, cache in zip(following, caches, strict=True):
        alone.append(runner.run(row[None], [cache])[0])
        cache.crop(cache.length - 2)
    np.testing.assert_allclose(runner.run(following, caches), np.stack(alone), atol=1e-4)
