"""A stranger's network and folder of pictures: `kinflow build --model`, interrupted and gone on with, then served."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'kinflow[builder]'")
pytest.importorskip("onnxscript", reason="pip install 'kinflow[builder]'")

from PIL import Image
from torch import nn

from kinflow.errors import InputError, SettingsError
from kinflow.family import Family
from kinflow_builder import readable
from kinflow_builder.folders import find
from kinflow_builder.own import Wishes, propose
from kinflow_builder.own_input import sized
from kinflow_builder.recipe import Recipe
from system_fixtures import LOOPBACK, running

pytestmark = pytest.mark.builder

CLASSES = ("gelber Kreis", "carré bleu", "三角")
EPOCHS = 6

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


def make():
    torch.manual_seed(0)
    return Net()
"""


def save(image: Image.Image, folder: Path, number: int) -> None:
    """In one of the kinds that people have."""
    kinds: tuple[Callable[[], None], ...] = (
        lambda: image.save(folder / f"{number}.jpg"),
        lambda: image.convert("L").save(folder / f"{number}.png"),
        lambda: image.convert("CMYK").save(folder / f"{number}.JPG", "JPEG"),
        lambda: image.convert("RGBA").save(folder / f"{number}.webp"),
    )
    kinds[number % len(kinds) if number % 5 == 0 else 0]()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One level of classes, 120 pictures: a bright stripe at one of three places on noise."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(120):
        pixels = random.integers(0, 90, (24, 30, 3))
        pixels[8 * (number % 3) : 8 * (number % 3) + 6] += 150
        folder = root / CLASSES[number % 3]
        folder.mkdir(exist_ok=True)
        save(Image.fromarray(pixels.astype(np.uint8)), folder, number)
    return root


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, after a build that was interrupted by Ctrl-C in the middle of training."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net.py").write_text(NETWORK)
    bundle = folder / "bundle"
    command = ["build", "--model", f"{folder}/net.py:make", "--images", str(photos), "--out", str(bundle)]
    command += ["--epochs", str(EPOCHS), "--minutes", "0.01", "--threads", "1"]
    with running(*command) as first:
        first.line("epoch 2/")
        first.process.send_signal(signal.SIGINT)
        assert first.wait() == 130
        first.line("the same command goes on")
    assert not bundle.exists()
    with running(*command) as second:
        assert second.wait(300) == 0, second.err[-5:]
        second.line(r"resumed after epoch [1-5]")
        assert not any("Traceback" in line for line in second.err)
    return bundle


def test_the_bundle_is_the_strangers(built: Path) -> None:
    """Labels are the folders' names, three members are aligned, and the card says how it was made."""
    manifest = Family.load(built).manifest
    assert set(manifest.labels) == set(CLASSES)
    assert list(manifest.members) == ["device", "edge", "cloud"]
    assert all(exit.accuracy > 0 for exit in manifest.exits.values())
    recipe = Recipe.load(built.with_name("bundle.work"))
    # Cut by cost, for features of a network that is not trained tell nothing.
    assert recipe.branches is not None
    assert not recipe.branches.teacher
    log = (built.with_name("bundle.work") / "train.log").read_text()
    assert "device in 8 bits by onnx: held-out top-1" in log
    assert "## Reproduce" in (built / "card.md").read_text()


def test_it_runs_in_three_tiers(built: Path, photos: Path) -> None:
    """Unchanged, between a device that is unsure of everything, an edge server and a cloud server."""
    with running("cloud", str(built), "--json", "--listen", LOOPBACK, "--port", "0", "--no-advertise") as cloud:
        above = cloud.ready()["broker"]
        options = ("--listen", LOOPBACK, "--port", "0", "--no-advertise", "--upstream", above)
        with running("edge", str(built), "--json", *options) as edge:
            options = (
                "--bundle",
                str(built),
                "--broker",
                edge.ready()["broker"],
                "--threshold",
                "1",
                "--deadline",
                "20",
            )
            with running("run", str(photos / CLASSES[0]), *options, "--limit", "8", "--json") as device:
                assert device.wait() == 0, device.err[-5:]
    answers = [json.loads(line) for line in device.out if "label" in line]
    assert len(answers) == 8
    assert all(answer["label"] in CLASSES for answer in answers)
    assert {answer["tier"] for answer in answers} <= {"edge", "cloud"}
    assert not any(answer["degraded"] for answer in answers)


def test_little_is_said(tmp_path: Path) -> None:
    """Twenty pictures make a proposal, which says what they cannot certify, what a part lacks and what was left out."""
    for name, count in {"train/a": 20, "train/b b": 12, "test/a": 4}.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20 + number, 30), (number, 200, 0)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c" / "photo.HEIC").write_text("of a telephone")
    (tmp_path / "net.py").write_text(NETWORK.replace("nn.Linear(16, 3)", "nn.Linear(16, 2)"))
    said: list[str] = []
    made = propose(Wishes(f"{tmp_path}/net.py:make", tmp_path, "few", minutes=0.01, threads=1), said.append)
    assert made.recipe.labels == ["a", "b b"]
    text = "\n".join(said)
    assert "test has no picture of 'b b'" in text
    assert "train/c holds no picture: it is no class" in text
    assert re.search(r"left out: \.heic, .* \(1\)", text)
    assert "too few to certify anything, 74 are the least" in text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), "gives 1232 logits, the pictures have 3 classes .*'三角'"),
        (nn.Sequential(nn.Conv2d(5, 2, 3)), "take 5 channels"),
        (nn.Conv2d(3, 3, 3), r"224x224: gives \[2, 3, 222, 222\].*--size"),
        (nn.Identity(), r"gives \[2, 3, 28, 28\]"),
    ],
)
def test_a_model_that_does_not_fit(photos: Path, model: nn.Module, message: str) -> None:
    """The error names what it gives, and what the pictures need."""
    with pytest.raises(SettingsError, match=message):
        sized(model, None, find(photos))


def test_every_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """At once and before training, with what is wrong; odd but whole kinds of files pass."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8))
    (tmp_path / "a").mkdir()
    for number in (0, 1, 5, 10, 15):
        save(image, tmp_path / "a", number)
    readable.check([find(tmp_path)])
    whole = (tmp_path / "a/1.jpg").read_bytes()
    (tmp_path / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a/cut.jpg is damaged or truncated.*take it away"):
        readable.check([find(tmp_path)])
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "a/text.png").write_text("no picture")
    with pytest.raises(InputError) as caught:
        readable.check([find(tmp_path)])
    assert "3 of 8 pictures" in str(caught.value)
    for name in ("cut.jpg", "empty.png", "text.png"):
        assert name in str(caught.value)
