"""Builds a stitched family's trunk: the device's own features first, through the graph that ships, then the servers."""

from __future__ import annotations

import copy
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kinflow.errors import SettingsError
from kinflow_builder import checkpoint, transform, wheels
from kinflow_builder.adapter import Adapter, fit_linear, unexplained
from kinflow_builder.crops import Pixels, crops, preprocessed
from kinflow_builder.data import cache_folder
from kinflow_builder.distil import Lesson, Pace, distil
from kinflow_builder.export import runner, write_graph
from kinflow_builder.export_int8 import Rounding, quantise_onnx
from kinflow_builder.stitch import Continued, Pretrained, stitched_trunk
from kinflow_builder.stitch_recipe import Source, StitchRecipe
from kinflow_builder.transform import Transform
from kinflow_builder.trunk import Trunk, function_of

if TYPE_CHECKING:
    from kinflow_builder.build import Build

BATCH = 8
# Hidden values from which the metric is taken.
METRIC_IMAGES = 160


class Probe(nn.Module):  # type: ignore[misc]
    """The device's graph before its bottleneck is known: hidden values instead of features.

    A stand-in takes the bottleneck's place. As an output alone, hidden values that an activation follows would be
    given the activation's range by the int8 quantiser, and be cut off.
    """

    output_names = ("features", "logits")

    def __init__(self, member: Pretrained, channels: int) -> None:
        super().__init__()
        self.below, self.above = member.below, member.above
        self.stand_in = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        nn.init.ones_(self.stand_in.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.below(x)
        return self.stand_in(hidden), self.above(hidden)


@dataclass(frozen=True)
class Seen:
    """What a member makes of all crops, in their order."""

    hidden: torch.Tensor
    """float16 [n, channels, height, width]"""
    logits: torch.Tensor
    """float32 [n, classes]"""


def stitched(build: Build, recipe: StitchRecipe, *, fresh: bool) -> Trunk:
    """In evaluation mode. Saves what each step found in the work folder, and goes on from there unless `fresh`.

    Raises SettingsError where members do not fit each other or the recipe, InputError for missing weights.
    """
    log, work = build.log, build.work
    if fresh:
        for path in work.glob("stitch-*.pt"):
            path.unlink()
    if not any(work.glob("stitch-*.pt")):
        log.truncate()
    names = list(recipe.stitch.members)
    device, *larger = [_pretrained(build.folder, source) for source in recipe.stitch.members.values()]
    # In the order of the images that the graph which ships takes its ranges from.
    pictures = build.images.train.spread(len(build.images.train))
    images = crops(pictures, recipe.preprocess, recipe.training.crops, recipe.training.seed)
    log.line(f"{recipe.id} {recipe.version}: {len(build.images.train)} pictures, {len(images)} crops")
    seen = _kept(build, recipe, names[0], partial(_seen_by_device, recipe, device, images))
    found, step = _fit_transform(recipe, device, seen.hidden)
    features = _decoded(found, step, seen.hidden)
    log.line(f"features: {'x'.join(map(str, features.shape[1:]))}, step {step:.4g}")
    servers = []
    for name, member in zip(names[1:], larger, strict=True):
        target = _kept(build, recipe, name, partial(_seen_by, member, recipe, images))
        server = _server(recipe, device, member, found, (features, target), name)
        _log_fit(build, server, features, target, name)
        _learn(build, recipe, server, Lesson(features, seen.logits, target.logits), name)
        servers.append(server)
    return stitched_trunk(names, recipe.stitch.split, device, found, step, servers)


def _pretrained(folder: Path, source: Source) -> Pretrained:
    make = function_of(folder, source.make, "stitch.members")
    given = []
    if source.weights is not None:
        content = wheels.read(source.weights, cache_folder())
        given.append(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    try:
        made = make(*given)
    except (TypeError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"{source.make}: {type(exc).__name__}: {exc}") from exc
    if not isinstance(made, Pretrained):
        raise SettingsError(f"{source.make} returns {type(made).__name__}, expected kinflow_builder.stitch.Pretrained")
    for half in (made.below, made.above):
        half.eval().requires_grad_(False)
    return made


def _kept(build: Build, recipe: StitchRecipe, name: str, make: Callable[[], Seen]) -> Seen:
    """What was saved by an interrupted build of the same recipe and pictures, or else is made and saved now."""
    path = build.work / f"stitch-{name}.pt"
    digest = _bound(recipe.seen_digest(), build)
    state = checkpoint.load(path, digest)
    if state is None:
        seen = make()
        checkpoint.save(path, digest, {"hidden": seen.hidden, "logits": seen.logits})
        return seen
    return Seen(state["hidden"], state["logits"])


def _bound(digest: str, build: Build) -> str:
    """Saved work is of one recipe and one set of pictures."""
    return hashlib.sha256((digest + build.images.train.sha256()).encode()).hexdigest()


def _seen_by_device(recipe: StitchRecipe, device: Pretrained, images: Pixels) -> Seen:
    """Through the graph at the precision that ships, before it has its bottleneck."""
    name = next(iter(recipe.stitch.members))
    precision = recipe.precision.get(name, "float")
    ranges = preprocessed(images[: recipe.stitch.calibration], recipe.preprocess)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "device.onnx"
        with torch.no_grad():
            channels = device.below(torch.from_numpy(ranges[:1])).shape[1]
        write_graph(Probe(device, channels).eval(), path, ranges[:2])
        if precision == "int8":
            quantise_onnx(path, Rounding(ranges, recipe.float_layers.get(name, 0)))
        run = runner(path)
        parts = [run(batch) for batch in _batches(images, recipe)]
    hidden, logits = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
    return Seen(torch.from_numpy(hidden).half(), torch.from_numpy(logits))


def _seen_by(member: Pretrained, recipe: StitchRecipe, images: Pixels) -> Seen:
    hidden, logits = [], []
    with torch.no_grad():
        for batch in _batches(images, recipe):
            values = member.below(torch.from_numpy(batch))
            hidden.append(values.half())
            logits.append(member.above(values).float())
    return Seen(torch.cat(hidden), torch.cat(logits))


def _batches(images: Pixels, recipe: StitchRecipe) -> Iterator[npt.NDArray[np.float32]]:
    for begin in range(0, len(images), BATCH):
        yield preprocessed(images[begin : begin + BATCH], recipe.preprocess)


def _fit_transform(recipe: StitchRecipe, device: Pretrained, hidden: torch.Tensor) -> tuple[Transform, float]:
    """The projection onto features, and the step at which they take the bytes that the recipe allows."""
    spec = recipe.stitch
    _, inputs, height, width = hidden.shape
    if height % spec.side or width % spec.side or spec.channels > inputs * spec.side**2:
        raise SettingsError(
            f"stitch: hidden values of {inputs}x{height}x{width} cannot be cut into patches of side {spec.side} "
            f"with {spec.channels} channels each"
        )
    if spec.split not in recipe.coding:
        raise SettingsError(f"coding has no entry for the split {spec.split!r}")
    chosen = np.linspace(0, len(hidden) - 1, min(len(hidden), METRIC_IMAGES)).astype(int)
    metric = transform.fisher(device.above, hidden[chosen].float(), spec.side, recipe.training.seed)
    found = transform.fit(hidden, metric, spec.channels, spec.side)
    features = _projected(found, hidden[chosen])
    return found, transform.step_for(features, recipe.coding[spec.split].bytes_target)


def _projected(found: Transform, hidden: torch.Tensor) -> torch.Tensor:
    bottleneck = found.bottleneck(1.0)
    with torch.no_grad():
        return torch.cat([bottleneck(part.float()) for part in hidden.split(BATCH)])


def _decoded(found: Transform, step: float, hidden: torch.Tensor) -> torch.Tensor:
    """float16 features as a server's codec gives them back."""
    bottleneck = found.bottleneck(step)
    with torch.no_grad():
        parts = [bottleneck.quantise(bottleneck(part.float())).half() for part in hidden.split(BATCH)]
    return torch.cat(parts)


def _server(
    recipe: StitchRecipe,
    device: Pretrained,
    member: Pretrained,
    found: Transform,
    seen: tuple[torch.Tensor, Seen],
    name: str,
) -> Continued:
    """The member behind an adapter that least squares found."""
    features, target = seen
    restore = found.restore()
    inputs, side = restore.out_channels, features.shape[2] * found.side
    outputs, plane = target.hidden.shape[1], target.hidden.shape[2]
    if side % plane:
        raise SettingsError(
            f"stitch.members.{name}: its hidden values are {plane} pixels wide, the device's {side}: expected a "
            "whole factor between them, cut it elsewhere"
        )
    fitted = Adapter(inputs, outputs, side // plane, bent=recipe.stitch.bent and recipe.training.epochs > 0)
    fit_linear(fitted, _pairs(restore, features, target.hidden))
    return Continued(restore, copy.deepcopy(device.above), fitted, member.above, recipe.stitch.share)


def _pairs(
    restore: nn.Module, features: torch.Tensor, hidden: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        for given, wanted in zip(features.split(BATCH), hidden.split(BATCH), strict=True):
            yield restore(given.float()), wanted.float()


def _log_fit(build: Build, server: Continued, features: torch.Tensor, target: Seen, name: str) -> None:
    missed = unexplained(server.adapter, _pairs(server.restore, features, target.hidden))
    build.log.line(f"{name}: the linear adapter misses {100 * missed:.1f}% of the variance")


def _learn(build: Build, recipe: StitchRecipe, server: Continued, lesson: Lesson, name: str) -> None:
    """Distils, unless an interrupted build did it."""
    training = recipe.training
    if not training.epochs:
        return
    path = build.work / f"stitch-{name}-learnt.pt"
    digest = _bound(recipe.digest(), build)
    state = checkpoint.load(path, digest)
    if state is None:
        pace = Pace(training.epochs, training.batch, training.learning_rate, training.seed)
        server.requires_grad_(True)
        with build.log.progress(name, pace.epochs) as bar:

            def report(epoch: int, loss: float) -> None:
                build.log.line(f"{name}: epoch {epoch}/{pace.epochs}, divergence {loss:.4f}")
                bar.advance(min(epoch, 1))

            distil(server, lesson, pace, report)
        checkpoint.save(path, digest, {"weights": server.state_dict()})
    else:
        server.load_state_dict(state["weights"])
        build.log.line(f"{name}: distilled before")
    server.requires_grad_(False)
