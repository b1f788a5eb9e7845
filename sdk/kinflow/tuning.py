"""Measures the ways in which a device member can run here, and keeps the fastest that gives the same answers.

A way is a backend, an accelerator and a number of threads. The first one (ONNX Runtime, or else TFLite, on one
thread of the CPU) is what the others' probabilities are compared with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from kinflow.backends import Acceleration, Accelerator
from kinflow.confidence import probabilities
from kinflow.errors import BackendError
from kinflow.family import Family, Member
from kinflow.manifest import BackendName

# Runtimes and int8 kernels differ a little; a wrong kernel (docs/boards.md) differs by far more.
TOLERANCE = 0.05
# A rival must be so much faster: what measuring scatters by, or fewer threads, decide otherwise.
MARGIN = 1.05
_SEED = 7
_MOST_RUNS = 200

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Way:
    backend: BackendName
    accelerator: Accelerator
    threads: int

    def __str__(self) -> str:
        place = "" if self.accelerator == "cpu" else f" on {self.accelerator}"
        return f"{self.backend}{place}, {self.threads} thread{'' if self.threads == 1 else 's'}"


@dataclass(frozen=True)
class Trial:
    """What one way did. `problem` is empty when it may be chosen."""

    way: Way
    run_ms: float
    """Median of one run; infinite when it did not run."""
    difference: float
    """Largest difference of a probability from the first way's."""
    problem: str


def ways(family: Family, member: str, cores: int, accelerators: Sequence[Accelerator]) -> list[Way]:
    """One and two threads, and all cores but one: the network and the camera need a core too."""
    threads = sorted({1, min(2, cores), max(1, cores - 1)})
    graphs = [family.manifest.segments[name].graphs for name in family.manifest.members[member].segments]
    backends: tuple[BackendName, ...] = ("onnx", "tflite")
    found = []
    for backend in backends:
        if all(backend in graph for graph in graphs) and _installed(backend):
            found += [Way(backend, "cpu", count) for count in threads]
            if backend == "onnx":
                found += [Way(backend, accelerator, 1) for accelerator in accelerators if accelerator != "cpu"]
    return found


def present_accelerators() -> list[Accelerator]:
    """Those that the installed ONNX Runtime was built with; whether they start is found out by a trial."""
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    from kinflow.backends.onnx import PROVIDERS

    built_in = onnxruntime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in built_in]


def try_all(
    family: Family,
    member: str,
    candidates: Sequence[Way],
    images: Array,
    *,
    seconds: float,
    engine_cache: str = "",
    slowed_down: Callable[[], str] = lambda: "",
) -> Iterator[Trial]:
    """Each way in turn, for about `seconds`. `images`: float32 [n, …] as the first segment takes them.

    `slowed_down` is asked after each: a word of heat or throttling, since what a hot board measures will not last.
    """
    reference: npt.NDArray[np.float64] | None = None
    for way in candidates:
        try:
            opened = family.member(
                member,
                backend=way.backend,
                threads=way.threads,
                acceleration=Acceleration(way.accelerator, engine_cache),
            )
            found = _answers(opened, images, family)
        except BackendError as exc:
            yield Trial(way, math.inf, math.inf, str(exc))
            continue
        reference = found if reference is None else reference
        difference = float(np.abs(found - reference).max())
        run_ms = _time_ms(opened, images[:1], seconds)
        problem = f"other answers: a probability differs by {difference:.2f}" if difference > TOLERANCE else ""
        yield Trial(way, run_ms, difference, problem or slowed_down())


def choose(trials: Sequence[Trial]) -> Trial:
    """The fastest that may be chosen, and among equals the one with fewer threads. Raises BackendError."""
    fit = [trial for trial in trials if not trial.problem]
    # Where every way heats the board too much, or the first one does, the coolest is one thread.
    fit = fit or [trial for trial in trials if math.isfinite(trial.run_ms) and trial.difference <= TOLERANCE][:1]
    if not fit:
        problems = "; ".join(f"{trial.way}: {trial.problem}" for trial in trials) or "no runtime is installed"
        raise BackendError(f"no way to run the member: {problems}")
    fastest = min(trial.run_ms for trial in fit)
    equals = [trial for trial in fit if trial.run_ms <= fastest * MARGIN]
    return min(equals, key=lambda trial: (trial.way.threads, trial.run_ms))


def made_up_images(shape: Sequence[int], count: int) -> Array:
    """Smooth noise, the same every time: [count, *shape] about as bright and varied as normalised photos."""
    random = np.random.default_rng(_SEED)
    channels, height, width = shape
    coarse = random.normal(size=(count, channels, -(-height // 4), -(-width // 4)))
    smooth = coarse.repeat(4, axis=2).repeat(4, axis=3)[..., :height, :width]
    return (smooth + 0.2 * random.normal(size=smooth.shape)).astype(np.float32)


def _installed(backend: BackendName) -> bool:
    names = ("onnxruntime",) if backend == "onnx" else ("ai_edge_litert", "tflite_runtime")
    return any(find_spec(name) is not None for name in names)


def _answers(member: Member, images: Array, family: Family) -> npt.NDArray[np.float64]:
    """[n, classes] calibrated probabilities."""
    rows = []
    for image in images:
        output = member.run(image[None])
        rows.append(probabilities(output.logits[0], family.manifest.exits[output.exit].temperature))
    return np.stack(rows)


def _time_ms(member: Member, image: Array, seconds: float) -> float:
    taken: list[float] = []
    stop_s = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < stop_s and len(taken) < _MOST_RUNS):
        start = time.perf_counter()
        member.run(image)
        taken.append((time.perf_counter() - start) * 1e3)
    return sorted(taken)[len(taken) // 2]
