"""Which way to run a member is chosen: the fastest with the same answers, never one that does not run."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kinflow import settings, tuning
from kinflow.backends import Acceleration
from kinflow.backends.onnx import choose
from kinflow.errors import BackendError, SettingsError
from kinflow.family import Family
from kinflow.tuning import Trial, Way

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture(scope="module")
def family(fashion: Path) -> Family:
    return Family.load(fashion)


def images(family: Family, count: int = 2) -> tuning.Array:
    spec = family.preprocess
    return tuning.made_up_images((len(spec.mean), spec.height, spec.width), count)


def trial(threads: int, run_ms: float, problem: str = "", difference: float = 0.0) -> Trial:
    return Trial(Way("onnx", "cpu", threads), run_ms, difference, problem)


def test_the_ways_of_a_board_with_four_cores(family: Family) -> None:
    """Each installed backend with one, two and three threads; one core is left for network and camera."""
    found = tuning.ways(family, "device", 4, ["cpu"])
    assert {way.threads for way in found} == {1, 2, 3}
    there = {"onnx"} | ({"tflite"} if find_spec("ai_edge_litert") or find_spec("tflite_runtime") else set())
    assert {way.backend for way in found} == there
    assert tuning.ways(family, "device", 1, [])[0] == Way("onnx", "cpu", 1)
    assert {way.threads for way in tuning.ways(family, "device", 1, [])} == {1}
    assert Way("onnx", "cuda", 1) in tuning.ways(family, "device", 2, ["cuda", "cpu"])


def test_real_runs_agree_and_one_is_chosen(family: Family) -> None:
    """Every way of this machine gives the same probabilities, and the chosen one can be used."""
    found = list(
        tuning.try_all(family, "device", tuning.ways(family, "device", 2, ["cpu"]), images(family), seconds=0.02)
    )
    assert all(each.problem == "" and each.difference < 0.01 and 0 < each.run_ms < 1e4 for each in found)
    way = tuning.choose(found).way
    chosen = settings.DeviceSettings(backend=way.backend, threads=way.threads, accelerator=way.accelerator)
    assert chosen.threads == way.threads


def test_what_does_not_start_is_not_chosen(family: Family) -> None:
    """An accelerator without its libraries is a trial with a problem, and the others go on."""
    ways = [Way("onnx", "cpu", 1), Way("onnx", "tensorrt", 1)]
    found = list(tuning.try_all(family, "device", ways, images(family), seconds=0.01))
    assert "tensorrt" in found[1].problem
    assert math.isinf(found[1].run_ms)
    assert tuning.choose(found).way == ways[0]


def test_other_answers_are_not_chosen(fashion: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that computes something else without an error, as one has done, is found out."""
    from kinflow.family import Member, Output

    real = Member.run
    opened: list[Member] = []

    def wrong_in_the_second(self: Member, batch: tuning.Array) -> Output:
        if self not in opened:
            opened.append(self)
        output = real(self, batch)
        return output if opened.index(self) == 0 else output._replace(logits=np.roll(output.logits, 1, axis=-1))

    monkeypatch.setattr(Member, "run", wrong_in_the_second)
    ways = [Way("onnx", "cpu", 1), Way("onnx", "cpu", 2)]
    found = list(tuning.try_all(family, "device", ways, images(family, 4), seconds=0.01))
    assert found[1].problem.startswith("other answers")
    assert tuning.choose(found).way == ways[0]
    assert fashion.is_dir()


def test_a_board_that_slows_down_is_not_what_was_measured(family: Family) -> None:
    """The way that heats it up is put aside; where all do, one thread is left."""
    words = iter(["", "the board is at 85 °C of 80"])
    ways = [Way("onnx", "cpu", 1), Way("onnx", "cpu", 2)]
    found = list(tuning.try_all(family, "device", ways, images(family), seconds=0.01, slowed_down=lambda: next(words)))
    assert [each.problem for each in found] == ["", "the board is at 85 °C of 80"]
    assert tuning.choose([trial(1, 9.0, "hot"), trial(3, 3.0, "hot")]).way.threads == 1


def test_among_equals_fewer_threads_win() -> None:
    """Three threads that gain nothing would only take the cores from the network and the camera."""
    assert tuning.choose([trial(1, 10.0), trial(2, 9.8), trial(3, 9.7)]).way.threads == 1
    assert tuning.choose([trial(1, 10.0), trial(2, 6.0), trial(3, 5.9)]).way.threads == 2
    with pytest.raises(BackendError, match="no way to run"):
        tuning.choose([trial(1, math.inf, "it does not start", math.inf)])
    with pytest.raises(BackendError, match="no runtime is installed"):
        tuning.choose([])


@pytest.mark.parametrize(
    ("kind", "available", "order"),
    [
        ("auto", [TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU]),
        ("auto", [CUDA, CPU], [CUDA, CPU]),
        ("auto", [CPU, "AzureExecutionProvider"], [CPU]),
        ("cuda", [TENSORRT, CUDA, CPU], [CUDA, CPU]),
        ("tensorrt", [TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU]),
        ("cpu", [TENSORRT, CUDA, CPU], [CPU]),
    ],
)
def test_providers_by_what_is_there(kind: str, available: list[str], order: list[str]) -> None:
    """TensorRT, then CUDA, then the CPU; what cannot be computed on one falls to the next."""
    assert choose(Acceleration(kind), available) == order  # type: ignore[arg-type]


def test_an_accelerator_that_is_not_there_is_refused(family: Family, tmp_path: Path) -> None:
    """Named, with where to get it; `auto` runs all the same."""
    with pytest.raises(BackendError, match="accelerator is 'cuda', this onnxruntime has cpu"):
        choose(Acceleration("cuda"), [CPU])
    batch = images(family)
    auto = family.member("device", acceleration=Acceleration("auto", str(tmp_path / "engines")))
    np.testing.assert_array_equal(auto.run(batch).logits, family.member("device").run(batch).logits)


def test_tensorrt_keeps_its_engines(tmp_path: Path) -> None:
    """The folder is made, and named to the provider."""
    cache = tmp_path / "engines"
    (name, options), *_ = choose(Acceleration("tensorrt", str(cache)), [TENSORRT, CPU])
    assert name == TENSORRT
    assert isinstance(options, dict)
    assert options["trt_engine_cache_path"] == str(cache)
    assert cache.is_dir()


def test_what_was_tuned_is_read_where_the_settings_say_so(tmp_path: Path) -> None:
    """Only then; a key beside it wins; a file that is not one is named."""
    tuned, file = tmp_path / "tuned.toml", tmp_path / "device.toml"
    found = settings.Tuned(backend="tflite", accelerator="cpu", threads=2, family="fashion 1", board='a "Pi"')
    settings.write_tuned(tuned, found)
    file.write_text(f'tuned = "{tuned}"\nthreads = 3\n')
    chosen = settings.load("device", settings.DeviceSettings, file)
    assert (chosen.backend, chosen.threads) == ("tflite", 3)
    file.write_text("")
    assert settings.load("device", settings.DeviceSettings, file).backend == "onnx"
    file.write_text(f"tuned = {json.dumps(str(tmp_path / 'absent'))}\n")
    with pytest.raises(SettingsError, match="absent"):
        settings.load("device", settings.DeviceSettings, file)
    tuned.write_text('backend = "cobol"\n')
    file.write_text(f'tuned = "{tuned}"\n')
    with pytest.raises(SettingsError, match=r"tuned\.toml: backend is 'cobol'"):
        settings.load("device", settings.DeviceSettings, file)
    with pytest.raises(SettingsError, match="absent"):
        settings.write_tuned(tmp_path / "absent/tuned.toml", found)
