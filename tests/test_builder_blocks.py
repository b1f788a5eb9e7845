"""Anybody's model taken apart: what the blocks compute, where it may be cut, and what a cut trunk computes."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")

from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder.blocks import blocks_of, last_of
from kinflow_builder.branches import around, branch_for, trunk_of
from kinflow_builder.choose import Candidate, candidates, choose_splits, even_splits, probe

pytestmark = pytest.mark.builder

IMAGE = torch.zeros(1, 3, 32, 32)


class Residual(nn.Module):
    """A block with a shortcut: inside it two values are alive."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, 2, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Net(nn.Module):
    """Functional layers between modules, as in most people's own models."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.one, self.two, self.three = Residual(8, 16), Residual(16, 24), Residual(24, 32)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.three(self.two(self.one(torch.relu(self.stem(x)))))
        return self.fc(x.mean((2, 3)) if mask is None else x)


class Attention(nn.Module):
    """A small vision transformer: a class token, positions that are added, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def names(model: nn.Module) -> list[str]:
    return [block.name for block in blocks_of(model, IMAGE)]


def run(modules: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for module in modules:
            x = module.eval()(x)
    return x


@pytest.mark.parametrize("make", [Net, Attention])
def test_blocks_in_a_row_are_the_model(make: type[nn.Module]) -> None:
    """On images of another batch size than the one that was traced, the blocks give the model's logits."""
    torch.manual_seed(0)
    model = make().eval()
    images = torch.randn(3, 3, 32, 32)
    found = run([block.module for block in blocks_of(model, IMAGE)], images)
    assert torch.allclose(found, run([model], images), atol=1e-5)


def test_no_cut_within_a_shortcut() -> None:
    """Blocks end where one tensor is alive: after each residual, never inside it; activations go along."""
    assert names(Net()) == ["stem", "one", "two", "three", "fc"]


def test_an_ordered_model_is_taken_as_it_is() -> None:
    """nn.Sequential within nn.Sequential is one order; layers without weights belong to the one before."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    assert names(model) == ["0.0", "1", "5"]


def test_names_are_found_as_people_write_them() -> None:
    """A module's name means its last block; a name that is not there is refused with those that are."""
    blocks = blocks_of(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 5, 3)), IMAGE)
    assert last_of(blocks, "0") == 1
    with pytest.raises(SettingsError, match=r"'layer9', there are 0\.0, 0\.1, 1"):
        last_of(blocks, "layer9")


class Branchy(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.mean() > 0 else self.layer(-x)


@pytest.mark.parametrize(
    ("model", "named"), [(Branchy(), "Branchy cannot be traced"), (nn.Conv2d(3, 4, 3), "one piece")]
)
def test_what_cannot_be_taken_apart(model: nn.Module, named: str) -> None:
    """The error names the model and the way out."""
    with pytest.raises(SettingsError, match=f"{named}.*nn.Sequential"):
        blocks_of(model, IMAGE)


def test_a_block_that_refuses_its_input_is_named() -> None:
    """A model whose layers do not fit each other says at which block, with the shape that came."""
    with pytest.raises((SettingsError, RuntimeError), match=r"32|channels"):
        blocks_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(9, 8, 3)), IMAGE)


@pytest.mark.parametrize(("make", "after"), [(Net, ["one", "two"]), (Attention, ["layers.0"])])
def test_a_cut_trunk_keeps_the_models_layers(make: type[nn.Module], after: list[str]) -> None:
    """The trunk has every weight of the model, a branch at each cut, and gives logits at each exit."""
    torch.manual_seed(0)
    model = make()
    members = ["device", "edge", "cloud"][-len(after) - 1 :]
    trunk = trunk_of(blocks_of(model, IMAGE), IMAGE, after, members, [4] * len(after))
    assert {id(parameter) for parameter in model.parameters()} <= {id(parameter) for parameter in trunk.parameters()}
    result = trunk.eval()(torch.randn(2, 3, 32, 32))
    assert {name: tuple(logits.shape) for name, logits in result.logits.items()} == dict.fromkeys(members, (2, 5))
    assert all(features.shape[1] == 4 and features.ndim == 4 for features in result.features.values())


def test_frozen_leaves_only_what_was_added_to_learn() -> None:
    """With a frozen backbone no weight of the model is trained, and the bottlenecks and branches are."""
    model = Net()
    trunk = trunk_of(blocks_of(model, IMAGE), IMAGE, ["one"], ["device", "cloud"], [4], frozen=True)
    learnt = {id(p) for p in trunk.parameters() if p.requires_grad}
    assert not learnt & {id(p) for p in model.parameters()}
    assert learnt


@pytest.mark.parametrize("shape", [(1, 8, 40, 40), (1, 8, 7, 7), (1, 17, 16)])
def test_what_is_restored_has_the_shape_of_what_was_sent(shape: tuple[int, ...]) -> None:
    """Large planes are sent small and come back large; tokens travel as a plane of one column."""
    hidden = torch.randn(shape)
    bottleneck, restore = around(hidden, 4)
    sent = bottleneck.eval()(hidden)
    assert sent.ndim == 4
    assert max(sent.shape[2:]) <= max(14, shape[1] if len(shape) == 3 else 0)
    assert run(restore, sent).shape == hidden.shape
    assert run([branch_for(hidden, 5)], hidden).shape == (1, 5)


@pytest.mark.parametrize(
    ("after", "members", "named"),
    [
        (["two", "one"], ["device", "edge", "cloud"], "not in the model's order"),
        (["fc"], ["device", "cloud"], "after its last block"),
        (["one"], ["device", "edge", "cloud"], "1 cuts make 2 members"),
    ],
)
def test_cuts_that_make_no_trunk(after: list[str], members: list[str], named: str) -> None:
    """Cuts out of order, after the end, or another number of members are refused by name."""
    with pytest.raises(SettingsError, match=named):
        trunk_of(blocks_of(Net(), IMAGE), IMAGE, after, members, [4] * len(after))


def test_probe_tells_what_is_linear() -> None:
    """Classes that a plane separates are told, noise is not, and neither is told by its own training images."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600)
    centres = random.normal(0, 3, (3, 12))
    assert probe(centres[labels] + random.normal(0, 1, (600, 12)), labels, 3) > 0.95
    assert probe(random.normal(0, 1, (600, 12)), labels, 3) < 0.45
    assert probe(random.normal(0, 1, (60, 400)), labels[:60], 3) < 0.7


def test_candidates_cost_more_the_deeper_they_are() -> None:
    """Cost shares rise to at most 1 and every place with a plane is offered, the logits are not."""
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 32, 32), np.arange(40) % 5
    found = candidates(blocks_of(Net(), IMAGE), images, labels, 5)
    assert [candidate.name for candidate in found] == ["stem", "one", "two"]
    shares = [candidate.cost_share for candidate in found]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


def test_chosen_cuts_are_worth_their_cost() -> None:
    """Accuracy that comes cheap is taken, a dear last point is not; of equals the smaller features."""
    found = [
        Candidate(0, "a", (8, 16, 16), 0.05, 0.30),
        Candidate(1, "b", (32, 8, 8), 0.20, 0.80),
        Candidate(2, "c", (16, 8, 8), 0.20, 0.80),
        Candidate(3, "d", (32, 8, 8), 0.45, 0.90),
        Candidate(4, "e", (64, 4, 4), 0.99, 0.91),
    ]
    assert [candidate.name for candidate in choose_splits(found)] == ["c", "d"]
    assert [candidate.name for candidate in choose_splits(found[:1])] == ["a"]


def test_an_untrained_model_is_cut_by_cost() -> None:
    """At a third and two thirds of it, whatever a probe makes of random features."""
    shares = (0.03, 0.20, 0.35, 0.52, 0.69, 0.83)
    found = [Candidate(i, str(i), (24, 8, 8), share, 0.9 - 0.1 * i) for i, share in enumerate(shares)]
    assert [candidate.name for candidate in even_splits(found)] == ["2", "4"]
    assert [candidate.name for candidate in even_splits(found[:1])] == ["0"]
