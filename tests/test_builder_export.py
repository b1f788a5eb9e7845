"""A tiny trunk goes out as graphs and a bundle, and comes back through the SDK."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
onnx = pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")
pytest.importorskip("onnxscript", reason="pip install 'kinflow[builder]'")

from importlib.util import find_spec

from rich.console import Console

from kinflow import idx
from kinflow.errors import BackendError, SettingsError
from kinflow.family import Family
from kinflow_builder import bundle, measure
from kinflow_builder.assemble import assemble
from kinflow_builder.build import Build, build_family, check_names, rebuild, write_samples
from kinflow_builder.cost import cost
from kinflow_builder.export import export_onnx, refuse_beyond
from kinflow_builder.folders import Division, Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.recipe import Exit, Recipe, Wanted
from kinflow_builder.trunk import Segment, Trunk, make_network
from system_fixtures import NARROW

pytestmark = [pytest.mark.builder, pytest.mark.usefixtures("brief_timing")]

FASHION = Path(__file__).parents[1] / "families" / "fashion"
HAS_CONVERTER = find_spec("litert_torch") is not None


def tiny_recipe(folder: Path | None = None) -> Recipe:
    """Fashion's network, narrow; a TFLite graph only where the converter is installed."""
    recipe = Recipe.load(folder or FASHION)
    training = msgspec.structs.replace(recipe.training, epochs=1, batch=32, threads=1)
    return msgspec.structs.replace(
        recipe,
        training=training,
        network=msgspec.structs.replace(recipe.network, options=NARROW),
        tflite_segments=["device"] if HAS_CONVERTER else [],
        # What training quantises with.
        coding={"s1": msgspec.structs.replace(recipe.coding["s1"], default=1.0)},
        data=msgspec.structs.replace(recipe.data, samples=20),
    )


def trained_like(recipe: Recipe) -> Trunk:
    """Random weights, and normalisation with statistics of its own, as after training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    trunk = make_network(FASHION, recipe.network)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return trunk.eval()


def inputs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 1, 28, 28)).astype(np.float32)


def quiet(folder: Path) -> BuildLog:
    return BuildLog(folder / "train.log", Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trunk, Family]:
    """The tiny trunk, and the bundle that was made of it."""
    stage = tmp_path_factory.mktemp("bundle")
    recipe = tiny_recipe()
    trunk = trained_like(recipe)
    manifest = assemble(stage, inputs(60), inputs(20, 1), recipe, trunk, quiet(tmp_path_factory.mktemp("log")))
    return trunk, bundle.write_manifest(stage, manifest)


def test_coded_path_is_the_trained_one(assembled: tuple[Trunk, Family]) -> None:
    """Graphs and codecs, hop by hop, give the logits of the trunk as it was trained: quantised in one piece."""
    trunk, family = assembled
    batch = inputs(8, 2)
    with torch.no_grad():
        expected = trunk(torch.from_numpy(batch)).logits
    for run in measure.run_coded(family, measure.in_batches(batch)):
        found, wanted = run.logits, expected[run.exit].numpy()
        assert np.abs(found - wanted).max() < 0.05 * max(1.0, wanted.std()), run.exit


def test_sizes_are_counted(assembled: tuple[Trunk, Family]) -> None:
    """The device sends nothing to itself, each later tier got coded features of some bytes."""
    _, family = assembled
    runs = measure.run_coded(family, measure.in_batches(inputs(4)))
    assert runs[0].bytes_up.tolist() == [0] * 4
    for run in runs[1:]:
        largest = np.prod(family.manifest.splits[run.source].shape) / 2
        assert 0 < run.bytes_up.mean() < 2 * largest


@pytest.mark.skipif(not HAS_CONVERTER, reason="needs litert-torch: pip install 'kinflow[builder-tflite]'")
def test_tflite_gives_the_same(assembled: tuple[Trunk, Family]) -> None:
    """The device's TFLite graph gives the answers and features of its ONNX graph."""
    _, family = assembled
    batch = inputs(4, 3)
    one, other = (family.member("device", backend=name).run(batch) for name in ("onnx", "tflite"))
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    assert one.features is not None
    np.testing.assert_allclose(one.features, other.features, atol=1e-4)


def test_half_weights_halve_the_file(tmp_path: Path) -> None:
    """Weights stored in 16 bits make the graph smaller and still right; the graph casts them itself."""
    segment = trained_like(tiny_recipe()).segments[2]
    example = np.random.default_rng(0).normal(0, 1, (4, 2, 7, 7)).astype(np.float32)
    full = export_onnx(segment, tmp_path / "full.onnx", example)
    half = export_onnx(segment, tmp_path / "half.onnx", example, "half")
    assert full <= 1e-5 < 2e-2
    assert half <= 2e-2
    weights = {
        name: sum(
            onnx.numpy_helper.to_array(tensor).nbytes
            for tensor in onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        )
        for name in ("full", "half")
    }
    assert weights["half"] < 0.65 * weights["full"]


class OtherWhenExported(torch.nn.Module):  # type: ignore[misc]
    """Stands for an exporter that gets a layer wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 if torch.compiler.is_compiling() else x


def test_wrong_graph_is_refused(tmp_path: Path) -> None:
    """A graph that computes something else than the module does not pass."""
    segment = Segment("odd", torch.nn.Identity(), exit="odd", branch=OtherWhenExported()).eval()
    example = np.ones((3, 4), np.float32)
    with pytest.raises(BackendError, match=r"odd\.onnx differs from torch"):
        export_onnx(segment, tmp_path / "odd.onnx", example)


def test_graphs_hold_no_folders(assembled: tuple[Trunk, Family]) -> None:
    """The exporter's notes, with the folders of the machine that built it, do not ship."""
    _, family = assembled
    for name, raw in family.files.items():
        assert str(FASHION.parents[1]).encode() not in raw, name
        assert b"site-packages" not in raw, name


def test_nan_is_refused(tmp_path: Path) -> None:
    """Not a number is no small difference."""
    with pytest.raises(BackendError):
        refuse_beyond(1.0, float("nan"), tmp_path / "x.onnx")


def test_cost_by_hand() -> None:
    """MACs and parameters of a convolution and a linear layer, computed by hand."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.nn.Flatten(), torch.nn.Linear(48, 5)
    )
    spent = cost(module, torch.zeros(1, 2, 4, 4))
    assert spent.macs == 16 * 3 * 2 * 9 + 48 * 5
    assert spent.parameters == 3 * 2 * 9 + 48 * 5 + 5


def test_failed_build_leaves_the_old_bundle(tmp_path: Path, assembled: tuple[Trunk, Family]) -> None:
    """An error on the way leaves the bundle that stood there, and no temporary folder."""
    folder = tmp_path / "bundle"
    _, family = assembled
    with bundle.staged(folder) as stage:
        for name, raw in family.files.items():
            (stage / name).write_bytes(raw)
        bundle.write_manifest(stage, family.manifest)
    before = Family.load(folder)
    with pytest.raises(RuntimeError), bundle.staged(folder):
        raise RuntimeError("power cut")
    assert Family.load(folder).manifest == before.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_names_that_the_network_lacks() -> None:
    """A recipe that names other exits, splits or segments than the network has is refused before training."""
    recipe = tiny_recipe()
    trunk = trained_like(recipe)
    check_names(recipe, trunk)
    weights = {"device": 1.0, "edge": 1.0}
    training = msgspec.structs.replace(recipe.training, exit_weights=weights)
    for wrong, named in (
        ({"training": training}, "training.exit_weights"),
        ({"precision": {"fog": "half"}}, "precision"),
        ({"coding": {"s2": recipe.coding["s1"]}}, "coding"),
        ({"members": {"device": ["device"], "fog": ["fog"]}}, "members.fog"),
    ):
        with pytest.raises(SettingsError, match=named):
            check_names(msgspec.structs.replace(recipe, **wrong), trunk)


def test_whole_build(tmp_path: Path) -> None:
    """From images to a verified bundle with card, plot, samples and a log without this machine's folders."""
    recipe = tiny_recipe()
    folder = tmp_path / "family"
    folder.mkdir()
    out = tmp_path / "out"
    (folder / "network.py").write_bytes((FASHION / "network.py").read_bytes())
    random = np.random.default_rng(0)

    def part(count: int) -> Pictures:
        pixels = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        return Pictures(pixels, random.integers(0, 10, count), recipe.labels)

    images = Division(part(96), part(60), part(40))
    build = Build(folder, out / "bundle", out / "work", recipe, images, quiet(out))
    found = build_family(build, fresh=False)
    write_samples(out / "samples", images.test, recipe)
    family = Family.load(out / "bundle")
    assert {name: exit.accuracy for name, exit in family.manifest.exits.items()} == found.coded
    # 48 images can certify nothing at 0.3%: no answer may then be kept.
    assert family.manifest.exits["device"].certificate is None
    assert family.manifest.exits["device"].threshold == 1.0
    card = (out / "bundle" / "card.md").read_text()
    assert f"{100 * found.coded['cloud']:.2f}%" in card
    assert (out / "bundle" / "accuracy_over_bytes.png").stat().st_size < 60_000
    np.testing.assert_array_equal(idx.read(out / "samples" / "images-idx3-ubyte.gz"), images.test.items[:20])
    np.testing.assert_array_equal(idx.read(out / "samples" / "labels-idx1-ubyte.gz"), images.test.truth[:20])
    assert str(tmp_path) not in (out / "train.log").read_text()

    stored = {name: part.graphs["onnx"].precision for name, part in family.manifest.segments.items()}
    assert stored == {"device": "float", "edge": "half", "cloud": "half"}

    # A bundle from before precisions stood in it gets the recipe's.
    manifest = out / "bundle" / "family.json"
    manifest.write_text(manifest.read_text().replace('"precision": "half"', '"precision": null'))
    # Another default rate and a promise that so few images can keep, with the graphs that are there.
    coding = {"s1": msgspec.structs.replace(recipe.coding["s1"], rates=[1.25], default=1.25)}
    precision: dict[str, Wanted] = {**recipe.precision, "device": "auto"}
    wish = msgspec.structs.replace(recipe, coding=coding, exits={"device": Exit(0.9, 0.5)}, precision=precision)
    rebuild(replace(build, recipe=wish))
    again = Family.load(out / "bundle")
    assert again.manifest.segments == family.manifest.segments
    assert again.manifest.splits["s1"].default_codec == "s1-q4x1.25"
    assert set(again.manifest.splits["s1"].codecs) == {"s1-q4", "s1-q4x1.25", "s1-q8"}
    assert again.manifest.splits["s1"].codecs["s1-q4"] == family.manifest.splits["s1"].codecs["s1-q4"]
    assert again.manifest.exits["device"].certificate is not None
    assert re.search(r"\| device.onnx \| [\d.]+ \| 32-bit floats \|", (out / "bundle" / "card.md").read_text())
    other = msgspec.structs.replace(recipe, coding={"s2": coding["s1"]})
    with pytest.raises(SettingsError, match="the bundle has the splits"):
        rebuild(replace(build, recipe=other))
