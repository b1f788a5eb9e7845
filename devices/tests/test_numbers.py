"""The same numbers on the other architecture: every committed bundle, every runtime, several processors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from emulator import Board

from conftest import FAMILIES, ROOT, Parts, Sdk, install_on_this_machine

# Float graphs agree to about six digits; quantised ones may round one step of 256 differently.
ABSOLUTE, RELATIVE = 2e-3, 2e-3
# A graph that begins with floats and goes on in 8 bits (`float_layers`) rounds a few values to the next step, and what
# follows carries that on: root mean square of the difference, in units of the output's spread. 8 bits themselves move
# such outputs by 0.08.
STEPS = 0.05
# Another version of a runtime rounds each int8 layer a little otherwise, which adds up to some steps of 256. Graphs
# that it silently got wrong had cosines of 0.62 and 0.92.
COSINE = 0.99
SCRIPT = Path(__file__).with_name("answers.py")


# A Cortex-A57 has the instructions of an A72, so the kernels are the same: no photographs, which take minutes, there.
LARGE = {"imagenet_lite"}

Arrays = dict[str, np.ndarray]


def load(folder: Path) -> dict[str, Arrays]:
    """By family."""
    return {path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this machine computes of every bundle."""
    out = tmp_path_factory.mktemp("made")
    subprocess.run([sys.executable, str(SCRIPT), "make", str(out), *map(str, FAMILIES)], check=True, timeout=600)
    return out


def repeated(board: Board, sdk: Sdk, families: Iterable[str], made: Path) -> dict[str, Arrays]:
    """What the board computes of the same."""
    out = board.root / "root/repeated"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    bundles = {ROOT / f"families/{name}/bundle": f"/bundles/{name}" for name in families}
    board.run(
        *("python3", "/tests/answers.py", "repeat", "/made", "/root/repeated", *bundles.values()),
        binds={**sdk.binds, SCRIPT.parent: "/tests", made: "/made", **bundles},
        environment=sdk.environment,
    )
    found = load(out)
    shutil.rmtree(out)
    assert list(found) == sorted(families)
    return found


def compare(here: Arrays, there: Arrays, runtimes: set[str], *, steps: bool = False) -> None:
    """Payloads and decoded features bit for bit, outputs within the tolerance; nothing is left out.

    `steps`: what the device's ONNX graph makes may be some steps of 256 apart.
    """
    wanted = {name for name in here if name.startswith(("payload/", "decoded/"))}
    wanted |= {name for name in here if name.startswith("run/") and name.split("/")[1] in runtimes}
    assert wanted <= there.keys()
    assert {name.split("/")[1] for name in there if name.startswith("run/")} == runtimes
    for name in wanted:
        if name.startswith("run/onnx/device/") and steps:
            apart = float(np.square(there[name] - here[name]).mean() ** 0.5 / here[name].std())
            assert apart <= STEPS, (name, apart)
        elif name.startswith("run/"):
            np.testing.assert_allclose(there[name], here[name], atol=ABSOLUTE, rtol=RELATIVE, err_msg=name)
        else:
            assert np.array_equal(there[name], here[name]), name


def runtimes_of(made: Arrays) -> set[str]:
    return {name.split("/")[1] for name in made if name.startswith("run/")}


@pytest.mark.parametrize("face", ["pi4", "jetson-nano", "jetson-orin"])
def test_answers_equal_this_machines(face: str, qemu: Parts, sdk: Sdk, made: Path, tmp_path: Path) -> None:
    """Both runtimes on a Cortex-A72, a Cortex-A57 and qemu's newest processor, whose int8 kernels are others."""
    board = Board.make(tmp_path / "root", qemu.root, face)
    here = load(made)
    families = here.keys() - (LARGE if face == "jetson-nano" else set())
    for name, there in repeated(board, sdk, families, made).items():
        compare(here[name], there, runtimes_of(here[name]), steps=name in LARGE)


def test_answers_of_tflite_runtime(qemu: Parts, wheels: Path, made: Path, tmp_path: Path) -> None:
    """The old runtime with numpy 1, which has silently computed other things from some graphs."""
    board = Board.make(tmp_path / "root", qemu.root, "pi4")
    here = {name: arrays for name, arrays in load(made).items() if "tflite" in runtimes_of(arrays)}
    target = install_on_this_machine(tmp_path / "sdk", wheels, "kinflow[tflite-runtime]")
    assert (target / "tflite_runtime").is_dir()
    for name, there in repeated(board, Sdk({target: "/sdk"}, {"PYTHONPATH": "/sdk"}), here, made).items():
        for output in filter(lambda key: key.startswith("run/tflite/"), here[name]):
            one, other = here[name][output].ravel(), there[output].ravel()
            cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            print(f"\ntflite-runtime: {name} {output}: cosine {cosine:.4f}")
            assert cosine >= COSINE, (name, output)
        exact = {key: value for key, value in here[name].items() if not key.startswith("run/")}
        compare(exact, {key: value for key, value in there.items() if not key.startswith("run/")}, set())


def test_the_comparison_can_fail(made: Path) -> None:
    """One wrong byte of a payload, one wrong logit, one missing runtime: each is noticed."""
    for family, here in load(made).items():
        steps = family in LARGE
        names = [next(name for name in here if name.startswith(kind)) for kind in ("payload/", "run/onnx/")]
        for name in names:
            wrong = dict(here)
            wrong[name] = here[name] + 1 + steps * here[name].std().astype(here[name].dtype)
            with pytest.raises(AssertionError):
                compare(here, wrong, runtimes_of(here), steps=steps)
        with pytest.raises(AssertionError):
            compare(here, {name: value for name, value in here.items() if "run/onnx" not in name}, runtimes_of(here))


def test_every_committed_bundle_is_here() -> None:
    """At least the one family that every checkout has."""
    assert ROOT / "families/fashion/bundle" in FAMILIES
