"""A head with a shortlist: the plane that hidden values lie near, and the tokens that it finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")

from kinflow.text.head import HeadRunner
from kinflow_builder.text import graph
from kinflow_builder.text.shortlist import TOKENS, Sketch, fit

pytestmark = pytest.mark.builder

WIDTH, VOCABULARY, DIMENSIONS = 128, 2048, 24
RANDOM = np.random.default_rng(0)
PLANE = RANDOM.normal(size=(DIMENSIONS, WIDTH))
CENTRE = RANDOM.normal(size=WIDTH) * 3
HEAD = RANDOM.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


def hidden(count: int, noise: float) -> np.ndarray:
    """Near a plane that does not go through 0."""
    values = CENTRE + RANDOM.normal(size=(count, DIMENSIONS)) @ PLANE + noise * RANDOM.normal(size=(count, WIDTH))
    return values.astype(np.float32)


def runner(made: onnx.ModelProto) -> HeadRunner:
    return HeadRunner("head", made.SerializeToString(), "head.onnx", 1)


@pytest.fixture(scope="module")
def sketch() -> Sketch:
    return fit(hidden(4000, 0.1), HEAD)


def test_the_plane_is_found(sketch: Sketch) -> None:
    """Values that it was not fitted to come back from 64 dimensions, but for their noise."""
    assert sketch.down.shape == (64, WIDTH)
    values = hidden(500, 0.1)
    back = sketch.centre + (values - sketch.centre) @ sketch.down.T @ sketch.up.T
    assert np.sqrt(np.square(back - values).mean()) < 0.1


def test_a_shortlist_has_the_likeliest_token(sketch: Sketch) -> None:
    """With the logits that the whole head gives these tokens; all of them different ones."""
    head = runner(graph.head(HEAD, "int8", sketch))
    found = 0
    for row in hidden(300, 0.3):
        logits = head.run(row[None])[0]
        likely = head.likely(row[None])
        assert likely is not None
        assert len(set(likely.tokens.tolist())) == TOKENS
        # 8 bits of the values that the whole head multiplies, and all of them here.
        np.testing.assert_allclose(likely.logits, logits[likely.tokens], atol=0.05 * np.abs(logits).max())
        token, confidence = likely.best(1.0)
        found += token == logits.argmax()
        assert 0 < confidence < 1
    assert found > 295


def test_a_plane_of_another_exit_finds_less() -> None:
    """The sketch matters: one of values elsewhere has the likeliest token far less often."""
    elsewhere = fit(RANDOM.normal(size=(4000, 4)).astype(np.float32) @ RANDOM.normal(size=(4, WIDTH)), HEAD)
    head = runner(graph.head(HEAD, "int8", elsewhere))
    rows = hidden(200, 0.3)
    found = 0
    for row in rows:
        likely = head.likely(row[None])
        assert likely is not None
        found += likely.best(1.0)[0] == head.run(row[None])[0].argmax()
    assert found < 150


def test_a_head_without_one_says_so() -> None:
    """Float heads and those of older bundles have logits alone."""
    for made in (graph.head(HEAD), graph.head(HEAD, "int8")):
        assert [output.name for output in made.graph.output] == ["logits"]
        head = runner(made)
        assert head.likely(hidden(1, 0.1)) is None
        assert head.run(hidden(2, 0.1)).shape == (2, VOCABULARY)


def test_a_shortlist_leaves_the_large_product_out(sketch: Sketch, tmp_path: Path) -> None:
    """The profile of a run has the product with all of the head, or the one with the sketch, never both."""
    made = graph.head(HEAD, "int8", sketch)
    assert ran(made, True, tmp_path) == [WIDTH]
    assert ran(made, False, tmp_path) == [len(sketch.down)]


def ran(made: onnx.ModelProto, whole: bool, folder: Path) -> list[int]:
    """Of the products with stored levels that a run computed, how many inputs each has."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / str(whole))
    session = onnxruntime.InferenceSession(made.SerializeToString(), options)
    session.run(None, {"hidden": hidden(1, 0.1), "all": np.array(whole)})
    events = json.loads(Path(session.end_profiling()).read_text())
    shapes = [event["args"]["input_type_shape"] for event in events if event["args"].get("op_name") == "MatMulNBits"]
    return [next(iter(shape[0].values()))[-1] for shape in shapes]
