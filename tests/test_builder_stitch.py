"""Members trained apart are stitched: transform, adapter, distillation, and the whole way to a bundle that runs."""

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
from torch import nn
from torch.nn import functional

from kinflow.errors import SettingsError
from kinflow.family import Family
from kinflow_builder import data, measure, stitch_recipe, transform
from kinflow_builder.adapter import Adapter, fit_linear, unexplained
from kinflow_builder.build import Build, build_family
from kinflow_builder.distil import Lesson, Pace, distil, divergence
from kinflow_builder.log import BuildLog
from kinflow_builder.stitch import Continued, combined
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
    # Both networks are trained here, on every kind of processor a little otherwise, and 200 pictures are few.
    assert right["edge"] >= right["device"] - 0.02
    assert right["edge"] >= alone - 0.08
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


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_transform_with_all_channels_loses_nothing() -> None:
    """Projection and restoration undo each other when no direction is dropped and nothing is rounded."""
    hidden = functional.avg_pool2d(noise(20, 3, 10, 10), 3, 1) + torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1)
    found = transform.fit(hidden, torch.eye(12), 12, 2)
    with torch.no_grad():
        back = found.restore()(found.bottleneck(1.0)(hidden))
    assert torch.allclose(back, hidden, atol=1e-3)


def test_directions_that_count_are_kept() -> None:
    """A channel that the answer ignores goes first, though it varies most."""
    hidden = noise(50, 2, 4, 4)
    hidden[:, 0] *= 2
    tail = nn.Sequential(nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():
        tail[1].weight[:, :16] = 0
    metric = transform.fisher(tail, hidden, 2, seed=0)
    assert float(metric.trace()) == pytest.approx(8, rel=1e-3)
    missed = []
    for chosen in (metric, torch.eye(8)):
        found = transform.fit(hidden, chosen, 4, 2)
        with torch.no_grad():
            back = found.restore()(found.bottleneck(1.0)(hidden))
        missed.append((back - hidden).square().mean((0, 2, 3))[1])
    assert missed[0] < 0.5 < 0.9 < missed[1]


def test_the_step_meets_the_budget() -> None:
    """Entropy at the step that is found is the budget, to within a hundredth, and grows with finer steps."""
    features = noise(40, 6, 5, 5)
    step = transform.step_for(features, 40.0)
    size = transform.entropy_bytes(features, step)
    assert 39.6 < size <= 40
    assert transform.entropy_bytes(features, step / 2) > size


def test_a_step_is_never_so_fine_that_features_are_cut_off() -> None:
    """Few large values among many small ones: two steps meet the budget, and the one that clips is not taken."""
    features = noise(40, 6, 5, 5) * torch.where(noise(40, 6, 5, 5, seed=1) > 1.5, 30.0, 1.0)
    sizes = [transform.entropy_bytes(features, step) for step in (0.02, 0.3, 8.0)]
    assert sizes[0] < 0.6 * sizes[1] > sizes[2]
    # 45 bytes are reached at a step of about 0.05, where nearly everything is cut off, and at 1, where a twentieth is.
    for budget in (45.0, 8.0):
        step = transform.step_for(features, budget)
        assert (features.abs() > 7.5 * step).float().mean() <= 1.1 * transform.CUT_SHARE
        assert transform.entropy_bytes(features, step) <= budget


def test_least_squares_finds_a_linear_relation() -> None:
    """Where the larger member's hidden values are a 3 x 3 convolution of the smaller one's, it is found."""
    torch.manual_seed(0)
    hidden = functional.avg_pool2d(noise(30, 4, 8, 8), 3, 1, 1)
    relation = nn.Conv2d(4, 7, 3, 1, 1)
    with torch.no_grad():
        wanted = relation(hidden)
    pairs = list(zip(hidden.split(10), wanted.split(10), strict=True))
    adapter = Adapter(4, 7, 1, bent=True)
    before = unexplained(adapter, pairs)
    fit_linear(adapter, pairs)
    assert unexplained(adapter, pairs) < 1e-3 < before


def test_distillation_comes_closer_to_both_models() -> None:
    """A few epochs lower both divergences on features that were not trained on."""
    torch.manual_seed(0)
    small, large = (nn.Sequential(nn.Flatten(), nn.Linear(32, 10)) for _ in range(2))
    hidden = noise(400, 2, 4, 4)
    with torch.no_grad():
        for model in (small, large):
            model[1].weight *= 4
        lesson = Lesson(hidden, small(hidden), large(hidden))
    # The models are right, what was put before them is not.
    member = Continued(nn.ConvTranspose2d(2, 2, 1), small, Adapter(2, 2, 1, bent=True), large, 0.5)

    def apart() -> list[float]:
        with torch.no_grad():
            answers = member.answers(hidden[300:])
        return [
            float(divergence(*pair)) for pair in zip(answers, (lesson.small[300:], lesson.large[300:]), strict=True)
        ]

    before = apart()
    told: list[int] = []
    first = Lesson(hidden[:300], lesson.small[:300], lesson.large[:300])
    distil(member, first, Pace(15, 30, 1e-2, 0), lambda epoch, _: told.append(epoch))
    assert told == list(range(16))
    assert all(now < 0.7 * then for now, then in zip(apart(), before, strict=True))


def test_shares_weigh_the_answers() -> None:
    """A share of 0 is the small member's answer, of 1 the larger one's, and between them both have a say."""
    small, large = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 3.0, 2.5]])
    assert combined(small, large, 0.0).argmax() == 0
    assert combined(small, large, 1.0).argmax() == 1
    middle = combined(small, large, 0.5).softmax(1)
    assert middle[0, 0] < small.softmax(1)[0, 0]
    assert middle[0, 1] > small.softmax(1)[0, 1]
