"""Members trained apart are stitched: the whole way to a bundle that runs."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
pytest.importorskip("onnx", reason="pip install 'kinflow[builder]'")
pytest.importorskip("onnxscript", reason="pip install 'kinflow[builder]'")

from rich.console import Console

from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow_builder import data, measure, stitch_recipe
from kinflow_builder.build import Build, build_family
from kinflow_builder.log import BuildLog
from kinflow_builder.stitch_recipe import StitchRecipe
from kinflow_builder.stitched import stitched
from kinflow_builder.trunk import function_of

pytestmark = [pytest.mark.builder, pytest.mark.usefixtures("brief_timing")]

SAMPLES = Path(__file__).parents[1] / "families/fashion/samples"

NETWORKS = '''
"""Two small networks for 28 x 28 pictures, of different widths and depths, trained apart on the same pictures."""

import sys
from pathlib import Path

import torch
from torch import nn

from kinflow import idx
from kinflow_builder.stitch import Pretrained

SAMPLES = Path({samples!r})


class Narrow(nn.Sequential):
    def __init__(self, width):
        super().__init__(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU6(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU6(),
            nn.Conv2d(width, width, 3, 1, 1),
        )


class Top(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        layers = [nn.ReLU6(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU6()]
        for _ in range(blocks):
            layers += [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU6()]
        self.layers = nn.Sequential(*layers)
        self.classify = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.classify(self.layers(x).mean((2, 3)))


def trained(width, blocks, epochs, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    below, above = Narrow(width), Top(width, blocks)
    # Every build calls this anew; training is once.
    kept = Path(__file__).with_name(f"{{width}}.pt")
    if kept.is_file():
        for half, state in zip((below, above), torch.load(kept, weights_only=True), strict=True):
            half.load_state_dict(state)
        return Pretrained(below, above)
    images = torch.from_numpy(idx.read(SAMPLES / "images-idx3-ubyte.gz")).float()[:, None] / 255 - 0.5
    labels = torch.from_numpy(idx.read(SAMPLES / "labels-idx1-ubyte.gz", 1)).long()
    parameters = [*below.parameters(), *above.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(50):
            loss = nn.functional.cross_entropy(above(below(images[part])), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.save([below.state_dict(), above.state_dict()], kept)
    return Pretrained(below, above)


def small():
    return trained(12, 0, 30, 0)


def large():
    return trained(16, 2, 30, 1)


def odd():
    return 1
'''

RECIPE = """
id = "pair"
version = "1.0.0"
title = "Two networks, stitched"
license = "Apache-2.0"
tflite_segments = []
precision = {{ device = "int8", edge = "weights8" }}
labels = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]

[members]
device = ["device"]
edge = ["device", "edge"]

[preprocess]
mode = "L"
height = 28
width = 28
mean = [0.5]
std = [1.0]
resize = "stretch"

[data]
kind = "folder"
source = "test pictures"
license = "MIT"
directory = {samples!r}

[stitch]
split = "s1"
side = 2
channels = 40
calibration = 64

[stitch.members.device]
make = "networks.py:small"

[stitch.members.edge]
make = "networks.py:large"

[training]
epochs = 4
batch = 20
learning_rate = 3e-3
crops = 2
seed = 0
threads = 1

[coding.s1]
bytes_target = 400
rates = [2.0]

[exits.device]
epsilon = 0.1
delta = 0.1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its networks."""
    made = tmp_path_factory.mktemp("pair")
    (made / "networks.py").write_text(NETWORKS.format(samples=str(SAMPLES)))
    (made / "recipe.toml").write_text(RECIPE.format(samples=str(SAMPLES)))
    return made


def build_of(folder: Path, out: Path, **training: float) -> Build:
    recipe = stitch_recipe.load(folder)
    assert isinstance(recipe, StitchRecipe)
    recipe = msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, **training))
    log = BuildLog(out / "train.log", Console(file=io.StringIO()))
    return Build(folder, out / "bundle", out / "work", recipe, data.load(recipe, folder), log)


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Family]:
    """The bundle that comes of it."""
    build = build_of(folder, tmp_path_factory.mktemp("out"))
    build_family(build, fresh=True)
    return build, Family.load(build.out)


def test_servers_keep_their_models_answers(built: tuple[Build, Family]) -> None:
    """From the int8 device's coded features the edge is at least as good as the device, and near the larger model."""
    build, family = built
    test = build.images.test
    device, edge = measure.run_coded(family, test.batches(family.preprocess))
    right = {run.member: measure.top1(run.logits, test.truth) for run in (device, edge)}
    own = function_of(build.folder, "networks.py:large", "test")()
    with torch.no_grad():
        logits = [own.above(own.below(torch.from_numpy(part))) for part in test.batches(family.preprocess)]
    alone = measure.top1(torch.cat(logits).numpy(), test.truth)
    assert right["edge"] >= right["device"] - 0.02
    assert right["edge"] >= alone - 0.04
    assert 0 < edge.bytes_up.mean() < 1.15 * 400


def test_the_device_computes_with_8_bits(built: tuple[Build, Family]) -> None:
    """Its graph is quantised, has features beside logits, and gives nearly torch's answers; the server's is not."""
    import onnx

    build, family = built
    graphs = {name: onnx.load(build.out / f"{name}.onnx").graph for name in ("device", "edge")}
    kinds = {name: {node.op_type for node in graph.node} for name, graph in graphs.items()}
    assert "QuantizeLinear" in kinds["device"]
    assert "QuantizeLinear" not in kinds["edge"]
    assert [output.name for output in graphs["device"].output] == ["features", "logits"]
    weights = [tensor for tensor in graphs["edge"].initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert weights
    assert family.manifest.segments["device"].split == "s1"


def test_a_build_goes_on_where_it_stopped(built: tuple[Build, Family]) -> None:
    """What was computed and distilled is there, and the trunk is the same."""
    build, _ = built
    assert isinstance(build.recipe, StitchRecipe)
    first = stitched(build, build.recipe, fresh=False)
    assert "edge: distilled before" in build.log.path.read_text()
    again = stitched(build, build.recipe, fresh=False)
    example = torch.zeros(2, 1, 28, 28)
    with torch.no_grad():
        one, other = first(example), again(example)
    assert torch.equal(one.logits["edge"], other.logits["edge"])


def test_work_of_another_recipe_is_refused(built: tuple[Build, Family]) -> None:
    """Saved work with other settings is an error that names the way out, not a wrong family."""
    build, _ = built
    assert isinstance(build.recipe, StitchRecipe)
    other = msgspec.structs.replace(build.recipe, stitch=msgspec.structs.replace(build.recipe.stitch, channels=12))
    with pytest.raises(SettingsError, match="--fresh"):
        stitched(build, other, fresh=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"side": 3}, "patches of side 3"),
        ({"channels": 1000}, "1000 channels"),
        ({"split": "s9"}, "s9"),
    ],
)
def test_recipes_that_do_not_fit_are_named(folder: Path, tmp_path: Path, change: dict, named: str) -> None:
    """Which field is wrong, and what the hidden values look like."""
    build = build_of(folder, tmp_path, epochs=0, crops=0)
    assert isinstance(build.recipe, StitchRecipe)
    recipe = msgspec.structs.replace(build.recipe, stitch=msgspec.structs.replace(build.recipe.stitch, **change))
    with pytest.raises(SettingsError, match=named):
        stitched(build, recipe, fresh=True)


def test_a_member_that_is_no_network_is_named(folder: Path, tmp_path: Path) -> None:
    """The recipe's function returned something else."""
    build = build_of(folder, tmp_path)
    assert isinstance(build.recipe, StitchRecipe)
    members = {**build.recipe.stitch.members, "edge": stitch_recipe.Source("networks.py:odd")}
    recipe = msgspec.structs.replace(build.recipe, stitch=msgspec.structs.replace(build.recipe.stitch, members=members))
    with pytest.raises(SettingsError, match=r"networks.py:odd returns int"):
        stitched(build, recipe, fresh=True)
