"""The manifest of a bundle: whatever is wrong in it is refused, with its place."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from kinflow.bundle import MANIFEST, MAX_MANIFEST_BYTES
from kinflow.errors import BundleError
from kinflow.family import Family
from spoiled import GRAPH, ONNX0, SEGMENT0, Document, drop, edit, put, refused

ONNX1 = ("segments", "trunk1", "graphs", "onnx")
CODEC = ("splits", "s1", "codecs", "q8")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """The small bundle, to be spoiled."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "truncated"),
        (b"not json", "malformed"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"title": "\xff"}', "utf-8"),
        (b"[" * 100_000, "Expected `object`"),
        (b"{}", "missing required field `schema`"),
        (b'{"schema": 2}', "schema"),
        (b" " * (MAX_MANIFEST_BYTES + 1), f"at most {MAX_MANIFEST_BYTES}"),
    ],
)
def test_a_manifest_that_is_none(copy: Path, raw: bytes, said: str) -> None:
    """No JSON, another schema, a megabyte of nothing."""
    (copy / MANIFEST).write_bytes(raw)
    assert said in refused(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # Keys and types
        (put("licence", value="MIT"), "unknown field `licence`"),
        (put(*ONNX0, "dtype", value="int8"), r"unknown field `dtype`.*segments"),
        (drop("labels"), "missing required field `labels`"),
        (put("schema", value=2), r"\$\.schema"),
        (put("task", value="magic"), r"\$\.task"),
        (put("labels", value="ten"), r"Expected `array`, got `str` - at `\$\.labels`"),
        (put("id", value="fa/shion"), r"\$\.id"),
        (put("exits", "device", "temperature", value=0), "temperature"),
        (put("exits", "device", "threshold", value=1.5), "threshold"),
        (put(*ONNX0, "file", "sha256", value="abc"), "sha256"),
        (put(*ONNX0, "file", "sha256", value="0" * 64), f"{GRAPH} has sha256"),
        (put(*ONNX0, "file", "bytes", value=0), "bytes"),
        (put("segments", "trunk0", "graphs", "onnx", "outputs", value=[]), "outputs"),
        (put("members", "device", "segments", value=[]), "segments"),
        (put("members", value={}), r"\$\.members"),
        # References
        (put("splits", "s1", "default_codec", value="q9"), "default_codec is 'q9', the codecs are 'q8'"),
        (put(*SEGMENT0, "source", value="s9"), "segments.trunk0.source is 's9', known are 'input', 's1'"),
        (put(*SEGMENT0, "split", value="s9"), "segments.trunk0.split is 's9', the splits are 's1'"),
        (put(*SEGMENT0, "exit", value="x"), "segments.trunk0.exit is 'x', the exits are 'device', 'cloud'"),
        (put("members", "edge", "segments", 1, value="x"), r"members.edge.segments\[1\] is 'x'"),
        (lambda d: d["splits"].update(input=d["splits"]["s1"]), "a split may not be called 'input'"),
        # Chains
        (put("members", "edge", "segments", value=["trunk1"]), "begins at 's1', expected 'input'"),
        (put("members", "edge", "segments", value=["trunk0", "trunk0"]), "begins at 'input', expected 's1'"),
        (put("members", "edge", "segments", value=["trunk0", "trunk1", "trunk1"]), "expected None"),
        (
            lambda d: (d["segments"]["trunk0"].update(exit=None), d["segments"]["trunk0"]["graphs"].clear()),
            "members.device must end with a segment that has an exit",
        ),
        # Shapes
        (put("preprocess", "mean", value=[0.0, 0.0]), "preprocess.mean .* need 1 entries for mode L"),
        (put("preprocess", "mode", value="RGB"), "need 3 entries for mode RGB"),
        (put("preprocess", "height", value=9), r"trunk0.graphs.onnx takes \[1, 8, 8\].*\[1, 9, 8\]"),
        (put(*ONNX0, "input", "shape", value=[3, 8, 8]), r"takes \[3, 8, 8\], its source has \[1, 8, 8\]"),
        (put(*ONNX1, "input", "shape", value=[2, 4, 4]), r"takes \[2, 4, 4\], its source has \[2, 8, 8\]"),
        (put("labels", value=["a", "b"]), r"need \[\[2, 8, 8\], \[2\]\]"),
        (put(*SEGMENT0, "exit", value=None), r"gives .*, its split and exit need \[\[2, 8, 8\]\]"),
        (put("splits", "s1", "shape", value=[2, 8, 9]), r"need \[\[2, 8, 9\], \[10\]\]"),
        # Codecs
        (put(*CODEC, "step", value=[0.1]), "codec 'q8': step and zero need 2 entries"),
        (put(*CODEC, "step", value=[0.1, -0.1]), "step"),
        (put(*CODEC, "step", value=[0.1, 1e-60]), "must be positive"),
        (put(*CODEC, "bits", value=5), "bits"),
        (put(*CODEC, "kind", value="pickle"), "kind"),
    ],
)
def test_a_manifest_that_does_not_hold_together(copy: Path, change: Callable[[Document], None], said: str) -> None:
    """Unknown keys, wrong types, names that point nowhere, segments that do not chain, shapes that do not meet."""
    edit(copy, change)
    with pytest.raises(BundleError, match=said):
        Family.load(copy)


def test_a_table_that_cannot_be_coded_with_is_refused(copy: Path) -> None:
    """A table is checked by its meaning, not by its digest alone."""
    table = zlib.compress(bytes(1024))
    name = json.loads((copy / MANIFEST).read_text())["splits"]["s1"]["codecs"]["q8"]["table"]["path"]
    (copy / name).write_bytes(table)
    edit(copy, put(*CODEC, "table", "sha256", value=hashlib.sha256(table).hexdigest()))
    assert "each table row must be positive" in refused(copy)
