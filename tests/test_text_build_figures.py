"""What a text family's figures are measured on: the members as they serve, beside the largest one alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")

from kinflow.text.family import TextFamily
from kinflow_builder.text.figures import Graphs
from kinflow_builder.text.tiny import SHAPE, write_tiny

pytestmark = pytest.mark.builder


def test_servers_are_measured_on_coded_features(tmp_path: Path) -> None:
    """Servers' exits are those of a text that goes over the wire, segment by segment; the device's own is not coded."""
    bundle = tmp_path / "bundle"
    figures = write_tiny(bundle)
    family = TextFamily.load(bundle)
    ids = np.random.default_rng(1).integers(3, SHAPE.vocabulary, (2, 20))
    graphs = Graphs(bundle, "int8")
    before = graphs.whole(ids)
    graphs.code(figures.scales)
    found = graphs.whole(ids)
    np.testing.assert_array_equal(found["device"], before["device"])
    assert np.abs(found["cloud"] - before["cloud"]).max() > 1e-3

    def passed(name: str, values: np.ndarray) -> np.ndarray:
        segment = family.segment(name, "int8" if name == "lower" else "float")
        return np.asarray(segment.run(values, [segment.past()]))

    def sent(split: str, values: np.ndarray) -> np.ndarray:
        codec = family.codec(split, "int8")
        return codec.decode(codec.encode(values[0]), values.shape[1])[None]

    for row, text in enumerate(ids):
        upper = passed("upper", sent("s1", passed("lower", text[None])))
        np.testing.assert_allclose(found["edge"][row], passed("branch-edge", upper)[0], atol=1e-4)
        np.testing.assert_allclose(found["cloud"][row], passed("top", sent("s2", upper))[0], atol=1e-4)


def test_perplexity_is_told_beside_the_largest_alone(tmp_path: Path) -> None:
    """The largest member in floats has the least on its own texts, and the cloud's is as near as 8 bits let it be."""
    figures = write_tiny(tmp_path / "bundle")
    assert figures.perplexity_float < figures.exits["cloud"].perplexity < 1.1 * figures.perplexity_float
    assert figures.exits["cloud"].perplexity < figures.exits["edge"].perplexity < figures.exits["device"].perplexity
