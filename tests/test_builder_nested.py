"""Nested low rank: factors are the best of their rank, members are prefixes, and a trunk trains them together."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import io
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")

from rich.console import Console
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import data, nested
from kinflow_builder.align_nested import train_nested
from kinflow_builder.budget import onnx_latency_s
from kinflow_builder.factors import FactoredConv, FactoredLinear, factored_layers, factorise
from kinflow_builder.log import BuildLog
from kinflow_builder.nested_trunk import NestedTrunk, nested_trunk
from kinflow_builder.recipe import Recipe
from kinflow_builder.train import Inputs, evaluate
from kinflow_builder.trunk import make_network

pytestmark = pytest.mark.builder


DIGITS = Path(__file__).parents[1] / "families" / "digits_nested"
# Modules before the split in the network below.
LOWER = 4


def network() -> nn.Sequential:
    """Convolutions of several shapes, and layers that must stay as they are."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, 1, 1, groups=12),
        nn.Conv2d(12, 20, (3, 1), dilation=(2, 1), padding=(2, 0), bias=False),
        nn.ReLU(),
        nn.Conv2d(20, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    ).eval()


def images(count: int = 64, seed: int = 1) -> torch.Tensor:
    """Neighbouring pixels are alike, as in pictures: some directions carry most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(count, 3, 10, 10, generator=generator).cumsum(2).cumsum(3) / 10
    return smooth + 0.3


def factored() -> nn.Module:
    return factorise(network(), [images()[:32], images()[32:]], keep=["11"])


def test_full_rank_changes_nothing() -> None:
    """Factored at full rank, a model computes what it did; grouped, kept and other layers are as they were."""
    model = factored()
    assert {name: type(layer) for name, layer in factored_layers(model).items()} == {
        "0": FactoredConv,
        "4": FactoredConv,
        "6": FactoredConv,
        "9": FactoredLinear,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(images(8, 2)), network()(images(8, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["0", "4", "9"])
def test_truncation_error_is_the_lost_energy(name: str) -> None:
    """The mean squared error of a layer of rank k is the energy of the components after k, on the inputs it saw."""
    original, model = network(), factored()
    layer = factored_layers(model)[name]
    seen: list[torch.Tensor] = []
    original.get_submodule(name).register_forward_hook(lambda _module, given, _output: seen.append(given[0]))
    with torch.no_grad():
        original(images())
        bias = layer.bias if layer.bias is not None else torch.zeros(layer.factors.leave.shape[0])
        shape = (1, -1) if isinstance(layer, FactoredLinear) else (1, -1, 1, 1)
        whole = layer(seen[0]) - bias.view(shape)
        for rank in range(1, layer.factors.components):
            layer.rank = rank
            error = (layer(seen[0]) - bias.view(shape) - whole).square().sum() / whole.square().sum()
            assert float(error) == pytest.approx(float(layer.factors.energy[rank:].sum()), rel=0.02, abs=1e-4)


def test_whitening_beats_plain_truncation() -> None:
    """On the inputs' own statistics, the whitened factors of rank 4 lose less than the matrix's own SVD does."""
    layer = nn.Linear(16, 16, bias=False)
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 16)
    model = factorise(nn.Sequential(layer), [x])
    left, values, right = torch.linalg.svd(layer.weight.detach())
    plain = left[:, :4] * values[:4] @ right[:4]
    with torch.no_grad():
        mine = nested.cut(model, {"0": 4})(x) - layer(x)
        assert mine.square().sum() < 0.8 * (x @ plain.T - layer(x)).square().sum()


def test_members_fit_their_budget_and_are_prefixes() -> None:
    """Each budget is kept and nearly used up, larger budgets never shrink a layer, and the cut is the prefix."""
    model = factored()
    whole = nested.parameters(network())
    assert nested.parameters(nested.cut(model, nested.full(model))) == whole
    before = dict.fromkeys(factored_layers(model), 1)
    for share in (0.4, 0.6, 0.8, 1.0):
        ranks = nested.fit(model, share * whole)
        member = nested.cut(model, ranks)
        assert (share - 0.08) * whole < nested.parameters(member) <= share * whole
        assert not factored_layers(member)
        assert all(ranks[name] >= before[name] for name in ranks)
        with torch.no_grad():
            torch.testing.assert_close(member(images(4)), nested.prefix(model, ranks)(images(4)), atol=1e-5, rtol=1e-4)
        before = ranks
    assert before == nested.full(model)


def test_the_measure_decides() -> None:
    """Any measure can be the budget: here the multiply-accumulates of the 1x1 layers alone."""
    model = factored()

    def work(member: nn.Module) -> float:
        return sum(m.weight.numel() for m in member.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))

    ranks = nested.fit(model, 400, work)
    assert 300 < work(nested.cut(model, ranks)) <= 400


def test_prefixes_share_their_factors_alone() -> None:
    """A step on the smallest member changes the components that larger ones have too, and nobody's bias but its own."""
    model = factored()
    small = nested.prefix(model, dict.fromkeys(factored_layers(model), 2))
    large = nested.prefix(model, nested.full(model))
    ours, theirs = factored_layers(small)["9"], factored_layers(large)["9"]
    assert ours.factors is theirs.factors
    small(images(4)).square().sum().backward()
    assert theirs.factors.enter.grad[:2].abs().sum() > 0
    assert theirs.factors.enter.grad[2:].abs().sum() == 0
    assert ours.bias.grad is not None
    assert theirs.bias.grad is None


def test_errors_name_the_way_out() -> None:
    """Impossible budgets, unknown names, unreached layers and foreign ranks are refused with their names."""
    model = factored()
    with pytest.raises(SettingsError, match="smallest member"):
        nested.fit(model, 10)
    with pytest.raises(SettingsError, match="'nowhere'"):
        factorise(network(), [images()], keep=["nowhere"])
    with pytest.raises(SettingsError, match="no Linear"):
        factorise(network(), [images()], keep=["0", "4", "6", "9", "11"])
    with pytest.raises(SettingsError, match=r"no input reached .*0, 11"):
        factorise(network(), [])
    with pytest.raises(SettingsError, match="ranks are given"):
        nested.prefix(model, {"0": 2})
    with pytest.raises(SettingsError, match=r"9: rank 99"):
        nested.cut(model, {**nested.full(model), "9": 99})


def test_attention_modules_are_left_whole() -> None:
    """PyTorch's own attention reads its layers' weights: they stay, and the model still runs."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval()
    x = torch.randn(4, 6, 16)
    found = factorise(model, [x])
    assert list(factored_layers(found)) == ["1"]
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), atol=1e-5, rtol=1e-4)


def test_latency_can_be_the_budget() -> None:
    """The seconds of one input in ONNX Runtime are a measure: two million parameters take longer than two thousand."""
    pytest.importorskip("onnxscript", reason="pip install 'kinflow[builder]'")
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(8)]
    measure = onnx_latency_s(torch.randn(1, 512))
    assert 0 < measure(nn.Sequential(nn.Linear(512, 4))) < measure(nn.Sequential(*layers))


def members(model: nn.Module) -> dict[str, nested.Ranks]:
    whole = nested.parameters(nested.cut(model, nested.full(model)))
    return {
        "device": nested.fit(model, 0.4 * whole),
        "edge": nested.fit(model, 0.7 * whole),
        "cloud": nested.full(model),
    }


def trunk() -> NestedTrunk:
    model = factored()
    return nested_trunk(model, LOWER, members(model), images(1), channels=4, split="s1").eval()


def test_trunk_feeds_both_ways() -> None:
    """Quantised items reach the larger members as the device's features, the others as each member's own."""
    found = trunk()
    x = images(6)
    with torch.no_grad():
        served = found(x)
        mixed = found(x, torch.tensor([0.0, 1.0] * 3))
        for segment in found.segments[1:]:
            own = found.own_logits(segment, x)
            torch.testing.assert_close(mixed.logits[segment.exit][::2], own[::2])
            torch.testing.assert_close(mixed.logits[segment.exit][1::2], served.logits[segment.exit][1::2])
            assert not torch.allclose(served.logits[segment.exit], own, atol=1e-6, rtol=0)


def test_shipped_trunk_is_plain_and_the_same() -> None:
    """What is exported has no factored layer and no training-only part, and answers as the nested one does."""
    found = trunk()
    ships = found.shipped()
    assert not factored_layers(ships)
    with torch.no_grad():
        for exit, logits in ships(images(6)).logits.items():
            torch.testing.assert_close(logits, found(images(6)).logits[exit], atol=1e-5, rtol=1e-4)
    assert [segment.source for segment in ships.segments] == [None, "s1", "s1"]
    assert nested.parameters(ships) < nested.parameters(found)


def test_members_must_grow() -> None:
    """A member that is smaller in some layer than the one before is refused by name."""
    model = factored()
    wrong = {"device": nested.full(model), "edge": members(model)["edge"]}
    with pytest.raises(SettingsError, match="'edge' is smaller than 'device'"):
        nested_trunk(model, LOWER, wrong, images(1), channels=4, split="s1")


def digits() -> tuple[Recipe, Inputs, Inputs]:
    """The digits' recipe, narrow and short, with a part of its images."""
    recipe = Recipe.load(DIGITS)
    assert recipe.nested is not None
    training = msgspec.structs.replace(recipe.training, epochs=6, threads=1)
    small = msgspec.structs.replace(
        recipe,
        training=training,
        network=msgspec.structs.replace(recipe.network, options={"width": 24, "heads": 2, "blocks": 2}),
        nested=msgspec.structs.replace(
            recipe.nested, after="1", keep=["0", "3"], epochs=4, channels=6, sizes={"device": 0.5, "edge": 0.7}
        ),
    )
    found = data.load(recipe, DIGITS)
    few = found.train.part(np.arange(600))
    return small, Inputs.read(few, recipe.preprocess), Inputs.read(found.test, recipe.preprocess)


def test_whole_way_on_digits(tmp_path: Path) -> None:
    """Whole model, factors, joint training: in seconds all members read digits, also from the device's features."""
    torch.set_num_threads(1)
    recipe, training, test = digits()
    log = BuildLog(tmp_path / "train.log", Console(file=io.StringIO()))
    torch.manual_seed(0)
    network = make_network(DIGITS, recipe.network)
    found, cutting = train_nested(recipe, network, training, test, tmp_path / "work", log, fresh=False)
    sizes = {name: nested.parameters(nested.cut(cutting.model, ranks)) for name, ranks in cutting.members.items()}
    assert sizes["device"] <= 0.5 * sizes["cloud"]
    assert sizes["edge"] <= 0.7 * sizes["cloud"]
    assert min(evaluate(found, test).values()) > 0.5
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert sum("epoch" in line and "loss" in line for line in lines) == 10
    # Both trainings are done: the same call reads them back and gives the same weights.
    again, _ = train_nested(recipe, network, training, test, tmp_path / "work", log, fresh=False)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, found.state_dict()[name])


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Sizes of unknown members, a split behind the last block and two splits are named before anything is trained."""
    recipe, training, test = digits()
    log = BuildLog(tmp_path / "train.log", Console(file=io.StringIO()))
    network = make_network(DIGITS, recipe.network)
    assert recipe.nested is not None
    coding = {"s1": recipe.coding["s1"], "s2": recipe.coding["s1"]}
    for wrong, named in (
        (msgspec.structs.replace(recipe, nested=msgspec.structs.replace(recipe.nested, sizes={"edge": 0.5})), "sizes"),
        (msgspec.structs.replace(recipe, nested=msgspec.structs.replace(recipe.nested, after="3")), "last block"),
        (msgspec.structs.replace(recipe, coding=coding), "one split"),
    ):
        with pytest.raises(SettingsError, match=named):
            train_nested(wrong, network, training, test, tmp_path, log, fresh=True)


def test_bench_trains_both_sides(tmp_path: Path) -> None:
    """`bench nested` on a tiny copy of the recipe: every figure by member, the ratio the smallest difference."""
    from kinflow_bench.nested import run

    shutil.copy(DIGITS / "network.py", tmp_path)
    shutil.copytree(DIGITS / "data", tmp_path / "data")
    text = (DIGITS / "recipe.toml").read_text()
    for old, new in (
        ("width = 48, heads = 4, blocks = 4", "width = 24, heads = 2, blocks = 2"),
        ('after = "2" # two of the four blocks', 'after = "1"'),
        ("device = 0.25, edge = 0.5", "device = 0.5, edge = 0.7"),
        ('keep = ["0", "5"]', 'keep = ["0", "3"]'),
        ("epochs = 20", "epochs = 1"),
        ("epochs = 100", "epochs = 1"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "recipe.toml").write_text(text)
    found = run(tmp_path, None, folds=5, only=3)
    assert found["epochs_alone"] == 2
    assert found["images_per_fold"] == 359
    assert found["device_parameters"] < found["edge_parameters"] < found["cloud_parameters"]
    differences = {name: found[f"{name}_served"] - found[f"{name}_alone"] for name in ("device", "edge", "cloud")}
    assert found["served_less_alone"] == pytest.approx(differences)
    assert found["ratio"] == min(differences.values())
    for figure in ("edge_own", "edge_uncoded", "cloud_own", "cloud_uncoded"):
        assert 0 <= found[figure] <= 100
