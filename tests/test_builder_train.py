"""Training a tiny trunk on tiny images: quantiser, resume, learning."""

# ruff: noqa: E402 - a skip with its reason comes before the imports that would fail

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")

from rich.console import Console

from kinflow.errors import SettingsError
from kinflow_builder import codecs
from kinflow_builder.augment import augment
from kinflow_builder.folders import Pictures
from kinflow_builder.log import BuildLog
from kinflow_builder.prune import Pruning
from kinflow_builder.quantiser import BITS, Bottleneck
from kinflow_builder.recipe import Recipe
from kinflow_builder.train import Inputs, evaluate, learning_rate, quantising, train
from kinflow_builder.trunk import Trunk, make_network
from system_fixtures import NARROW

pytestmark = pytest.mark.builder

FASHION = Path(__file__).parents[1] / "families" / "fashion"


def tiny_recipe(epochs: int) -> Recipe:
    """Fashion's own network, narrow, and small batches on one thread."""
    recipe = Recipe.load(FASHION)
    training = msgspec.structs.replace(
        recipe.training, epochs=epochs, batch=32, threads=1, learning_rate=0.05, average=0.9
    )
    network = msgspec.structs.replace(recipe.network, options=NARROW)
    return msgspec.structs.replace(recipe, training=training, network=network)


def tiny_inputs(count: int, seed: int) -> Inputs:
    """Bright squares whose place is the label: easy, but not without learning."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    images = random.integers(0, 20, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 5)
        image[3 + 12 * row : 12 + 12 * row, 1 + 5 * column : 6 + 5 * column] += 180
    recipe = Recipe.load(FASHION)
    return Inputs.read(Pictures(images, labels.astype(np.int64), recipe.labels), recipe.preprocess)


def quiet(path: Path) -> BuildLog:
    return BuildLog(path / "train.log", Console(file=io.StringIO()))


def make(recipe: Recipe) -> Trunk:
    torch.manual_seed(0)
    trunk = make_network(FASHION, recipe.network)
    assert isinstance(trunk, Trunk)
    return trunk


def run(recipe: Recipe, work: Path, *, fresh: bool = False) -> dict[str, torch.Tensor]:
    """The weights after training, as they would ship."""
    torch.set_num_threads(1)
    trunk = train(make(recipe), recipe, tiny_inputs(96, 0), tiny_inputs(40, 1), work, quiet(work), fresh=fresh)
    return {name: value.clone() for name, value in trunk.state_dict().items()}


class Interrupted(Exception):
    """Stands for Ctrl-C."""


class StopAfter(BuildLog):
    """A log that breaks off the build at a line."""

    def line(self, text: str) -> None:
        super().line(text)
        if text.startswith("epoch 2/"):
            raise Interrupted


@pytest.mark.parametrize("shape", [(4, 14, 14), (3, 7, 7)])
def test_quantiser_is_the_codec(shape: tuple[int, int, int]) -> None:
    """The layer that was trained with gives the very values that the shipped codec's decoder gives."""
    bottleneck = Bottleneck(8, shape[0], step=1.5).eval()
    hidden = torch.randn(64, 8, *shape[1:], generator=torch.Generator().manual_seed(0)) * 4
    with torch.no_grad():
        features = bottleneck(hidden)
        # The edges between two levels and values beyond the last level.
        features[0, 0, 0, :6] = torch.tensor([0.75, -0.75, 2.25, 100.0, -100.0, 0.0])
        expected = bottleneck.quantise(features).numpy()
    codec = codecs.fit("s1-q4", features.numpy(), features[:8].numpy(), bottleneck.step, BITS).codec
    found = np.stack([codec.decode(codec.encode(item)) for item in features.numpy()])
    np.testing.assert_array_equal(found, expected)


def test_gradient_passes_the_rounding() -> None:
    """Inside the range the gradient is that of the identity, outside it is none."""
    bottleneck = Bottleneck(1, 1, step=1.0)
    features = torch.tensor([-20.0, -3.3, 0.2, 6.9, 20.0]).view(1, 1, 1, 5).requires_grad_()
    bottleneck.quantise(features).sum().backward()
    assert features.grad is not None
    assert features.grad.flatten().tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_rate_falls_with_the_spread() -> None:
    """Narrow features are estimated as cheaper, and the estimate is near what the codec really takes."""
    generator = torch.Generator().manual_seed(0)
    bottleneck = Bottleneck(4, 4, step=1.0).train()
    wide = torch.randn(200, 4, 14, 14, generator=generator) * 2
    for _ in range(600):
        estimated = float(bottleneck.rate_bytes(wide).detach())
    narrow = float(bottleneck.eval().rate_bytes(wide / 4).detach())
    real = codecs.fit("s1-q4", wide.numpy(), wide.numpy()[:50], 1.0, BITS).spec.bytes_mean
    assert narrow < 0.8 * estimated
    assert estimated == pytest.approx(real, rel=0.1)


def test_resume_gives_the_same_weights(tmp_path: Path) -> None:
    """A build that was interrupted after the second of three epochs ends with the weights of one that was not."""
    recipe = tiny_recipe(3)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = run(recipe, tmp_path / "whole")
    log = StopAfter(tmp_path / "broken" / "train.log", Console(file=io.StringIO()))
    data, held_out = tiny_inputs(96, 0), tiny_inputs(40, 1)
    with pytest.raises(Interrupted):
        train(make(recipe), recipe, data, held_out, tmp_path / "broken", log, fresh=False)
    resumed = run(recipe, tmp_path / "broken")
    assert "resumed after epoch 2" in (tmp_path / "broken" / "train.log").read_text()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    """A checkpoint of another recipe is refused by name, and --fresh forgets it."""
    run(tiny_recipe(1), tmp_path)
    with pytest.raises(SettingsError, match="another recipe or other options"):
        run(tiny_recipe(2), tmp_path)
    run(tiny_recipe(2), tmp_path, fresh=True)


def test_broken_checkpoint(tmp_path: Path) -> None:
    """Damage is an error with a way out, not a traceback of pickle."""
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SettingsError, match="--fresh"):
        run(tiny_recipe(1), tmp_path)


def test_it_learns(tmp_path: Path) -> None:
    """Easy images are told apart by every exit after some epochs."""
    torch.set_num_threads(1)
    recipe = tiny_recipe(6)
    training = msgspec.structs.replace(recipe.training, shift=0, erase=0, batch=16)
    recipe = msgspec.structs.replace(recipe, training=training)
    data, held_out = tiny_inputs(600, 0), tiny_inputs(200, 1)
    # Mirroring would make left and right labels the same: this only needs to be far above chance.
    trunk = train(make(recipe), recipe, data, held_out, tmp_path, quiet(tmp_path), fresh=True)
    for name, share in evaluate(trunk, held_out).items():
        assert share > 0.3, name


def test_augmentation_moves_and_blanks() -> None:
    """A bright pixel ends up within the shift, mirrored or not, and erased squares have the blank value."""
    images = torch.full((400, 1, 9, 9), -1.0)
    images[:, 0, 4, 2] = 1.0
    settings = msgspec.structs.replace(tiny_recipe(1).training, shift=1, erase=0, mirror=True)
    moved = augment(images, settings, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    places = {(int(row), int(column)) for _, _, row, column in (moved == 1.0).nonzero()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (1, 2, 3, 5, 6, 7)}
    still = augment(images, msgspec.structs.replace(settings, shift=0, mirror=False), torch.Generator())
    assert torch.equal(still, images)
    images = torch.ones(400, 1, 9, 9)
    images[0] = -1.0
    settings = msgspec.structs.replace(settings, shift=0, erase=4)
    erased = augment(images, settings, torch.Generator().manual_seed(0))
    blanked = (erased[1:] == -1.0).sum((1, 2, 3))
    assert int(blanked.max()) == 9
    assert int(blanked.min()) >= 4


def test_learning_rate_cycle() -> None:
    """It rises to the recipe's rate during the warm-up and falls to almost nothing at the end."""
    settings = tiny_recipe(1).training
    rates = [learning_rate(settings, step / 100) for step in range(101)]
    top = round(100 * settings.warmup)
    assert max(rates) == pytest.approx(settings.learning_rate, rel=1e-3)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < settings.learning_rate / 1000


def test_quantiser_comes_in_slowly() -> None:
    """Nothing is quantised at first, everything after twice that time, and at once where the recipe says 0."""
    settings = msgspec.structs.replace(tiny_recipe(1).training, quantise_from=0.2)
    assert [quantising(settings, progress) for progress in (0.0, 0.19)] == [0.0, 0.0]
    assert quantising(settings, 0.3) == pytest.approx(0.5)
    assert [quantising(settings, progress) for progress in (0.4, 1.0)] == [1.0, 1.0]
    assert quantising(msgspec.structs.replace(settings, quantise_from=0.0), 0.0) == 1.0


def test_network_that_is_not_there() -> None:
    """A wrong file, function, option or return value is an error that names it."""
    network = Recipe.load(FASHION).network
    for make, named in (
        ("other.py:make", "other.py"),
        ("network.py:build", "'build'"),
        ("network.py:conv", "conv"),
    ):
        with pytest.raises(SettingsError, match=named):
            make_network(FASHION, msgspec.structs.replace(network, make=make))


def test_pruning_keeps_the_mean() -> None:
    """Of the images below the mean loss half stay away, the others count twice; hard and unseen images always stay."""
    losses = torch.cat([torch.linspace(0.0, 0.1, 800), torch.linspace(2.0, 4.0, 200)])
    pruning = Pruning(1000, 0.5)
    everything = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    pruning.saw(everything[1:], losses[1:])
    assert sorted(pruning.epoch(generator, 0.0)[0].tolist()) == everything.tolist()
    pruning.saw(everything, losses)
    sums = torch.zeros(2)
    for _ in range(50):
        order, weights = pruning.epoch(generator, 0.5)
        assert len(order) == len(set(order.tolist()))
        assert set(range(800, 1000)) <= set(order.tolist())
        assert 500 < len(order) < 700
        sums += torch.stack([(losses * weights)[order].sum(), weights[order].sum()])
    assert float(sums[0] / sums[1]) == pytest.approx(float(losses.mean()), rel=0.02)
    order, weights = pruning.epoch(generator, 0.9)
    assert len(order) == 1000
    assert bool((weights == 1).all())
