"""Nested low rank: factors are the best of their rank, members are prefixes, and a trunk trains them together."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")

from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import nested
from kinflow_builder.factors import FactoredConv, FactoredLinear, factored_layers, factorise
from kinflow_builder.nested_trunk import Divided, NestedTrunk, Passage, nested_trunk
from kinflow_builder.quantiser import Bottleneck

pytestmark = pytest.mark.builder


def network() -> Divided:
    """Convolutions of several shapes, and layers that must stay as they are."""
    torch.manual_seed(0)
    lower = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1, groups=12)
    )
    upper = nn.Sequential(
        nn.Conv2d(12, 20, (3, 1), dilation=(2, 1), padding=(2, 0), bias=False),
        nn.ReLU(),
        nn.Conv2d(20, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )
    return Divided(lower, upper).eval()


def images(count: int = 64, seed: int = 1) -> torch.Tensor:
    """Neighbouring pixels are alike, as in pictures: some directions carry most of the energy."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(count, 3, 10, 10, generator=generator).cumsum(2).cumsum(3) / 10
    return smooth + 0.3


def factored() -> nn.Module:
    return factorise(network(), [images()[:32], images()[32:]], keep=["upper.7"])


def test_full_rank_changes_nothing() -> None:
    """Factored at full rank, a model computes what it did; grouped, kept and other layers are as they were."""
    model = factored()
    assert {name: type(layer) for name, layer in factored_layers(model).items()} == {
        "lower.0": FactoredConv,
        "upper.0": FactoredConv,
        "upper.2": FactoredConv,
        "upper.5": FactoredLinear,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(images(8, 2)), network()(images(8, 2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["lower.0", "upper.0", "upper.5"])
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
    ours, theirs = factored_layers(small)["upper.5"], factored_layers(large)["upper.5"]
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
        factorise(network(), [images()], keep=["lower", "upper"])
    with pytest.raises(SettingsError, match=r"no input reached .*lower.0"):
        factorise(network(), [])
    with pytest.raises(SettingsError, match="ranks are given"):
        nested.prefix(model, {"lower.0": 2})
    with pytest.raises(SettingsError, match=r"upper.5: rank 99"):
        nested.cut(model, {**nested.full(model), "upper.5": 99})


def test_attention_modules_are_left_whole() -> None:
    """PyTorch's own attention reads its layers' weights: they stay, and the model still runs."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16)).eval()
    x = torch.randn(4, 6, 16)
    found = factorise(model, [x])
    assert list(factored_layers(found)) == ["1"]
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), atol=1e-5, rtol=1e-4)


def trunk() -> NestedTrunk:
    model = factored()
    whole = nested.parameters(network())
    members = {
        "device": nested.fit(model, 0.4 * whole),
        "edge": nested.fit(model, 0.7 * whole),
        "cloud": nested.full(model),
    }
    return nested_trunk(model, members, Passage("s1", Bottleneck(12, 4, step=1.0), nn.Conv2d(4, 12, 1))).eval()


def test_trunk_feeds_both_ways() -> None:
    """Quantised items reach the larger members as the device's features, the others as each member's own."""
    found = trunk()
    x = images(6)
    with torch.no_grad():
        served = found(x)
        own = found(x, torch.ones(6, dtype=torch.bool))
        mixed = found(x, torch.tensor([True, False] * 3))
        first, *larger = found.segments
        coded = first.bottleneck.quantise(served.features["s1"])
        for segment in larger:
            torch.testing.assert_close(served.logits[segment.exit], segment(coded)[0])
            torch.testing.assert_close(own.logits[segment.exit], segment(found.own_features(segment.name, x))[0])
            torch.testing.assert_close(mixed.logits[segment.exit][::2], own.logits[segment.exit][::2])
            torch.testing.assert_close(mixed.logits[segment.exit][1::2], served.logits[segment.exit][1::2])
    assert not torch.allclose(served.logits["cloud"], own.logits["cloud"], atol=1e-3)


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
    members = {"device": nested.full(model), "edge": nested.fit(model, 0.7 * nested.parameters(network()))}
    with pytest.raises(SettingsError, match="'edge' is not larger than 'device'"):
        nested_trunk(model, members, Passage("s1", Bottleneck(12, 4, step=1.0), nn.Conv2d(4, 12, 1)))
