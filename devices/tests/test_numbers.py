"""The same numbers on the other architecture: every committed bundle, every runtime, several processors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import Board

from conftest import FAMILIES, ROOT, Parts, Sdk, install_on_this_machine

# Float graphs agree to about six digits; quantised ones may round one step of 256 differently.
ABSOLUTE, RELATIVE = 2e-3, 2e-3
# Another version of a runtime rounds each int8 layer a little otherwise, which adds up to some steps of 256. Graphs
# that it silently got wrong had cosines of 0.62 and 0.92.
COSINE = 0.99
SCRIPT = Path(__file__).with_name("answers.py")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda path: path.parent.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(bundle, what this machine computes of it)"""
    out = tmp_path_factory.mktemp("made") / "made.npz"
    subprocess.run([sys.executable, str(SCRIPT), "make", str(request.param), str(out)], check=True, timeout=600)
    return request.param, out


def repeated(board: Board, sdk: Sdk, bundle: Path, made: Path) -> dict[str, np.ndarray]:
    """What the board computes of the same."""
    out = board.root / "root/repeated.npz"
    out.unlink(missing_ok=True)
    board.run(
        *("python3", "/tests/answers.py", "repeat", "/bundle", "/made/made.npz", "/root/repeated.npz"),
        binds={**sdk.binds, SCRIPT.parent: "/tests", bundle: "/bundle", made.parent: "/made"},
        environment=sdk.environment,
    )
    return dict(np.load(out))


def compare(here: dict[str, np.ndarray], there: dict[str, np.ndarray], runtimes: set[str]) -> None:
    """Payloads and decoded features bit for bit, outputs within the tolerance; nothing is left out."""
    wanted = {name for name in here if name.startswith(("payload/", "decoded/"))}
    wanted |= {name for name in here if name.startswith("run/") and name.split("/")[1] in runtimes}
    assert wanted <= there.keys()
    assert {name.split("/")[1] for name in there if name.startswith("run/")} == runtimes
    for name in wanted:
        if name.startswith("run/"):
            np.testing.assert_allclose(there[name], here[name], atol=ABSOLUTE, rtol=RELATIVE, err_msg=name)
        else:
            assert np.array_equal(there[name], here[name]), name


def runtimes_of(made: dict[str, np.ndarray]) -> set[str]:
    return {name.split("/")[1] for name in made if name.startswith("run/")}


@pytest.mark.parametrize("face", ["pi4", "jetson-nano", "jetson-orin"])
def test_answers_equal_this_machines(face: str, qemu: Parts, sdk: Sdk, made: tuple[Path, Path], tmp_path: Path) -> None:
    """Both runtimes on a Cortex-A72, a Cortex-A57 and qemu's newest processor."""
    board = Board.make(tmp_path / "root", qemu.root, face)
    here = dict(np.load(made[1]))
    compare(here, repeated(board, sdk, *made), runtimes_of(here))


def test_answers_of_tflite_runtime(pi: Board, wheels: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    """The old runtime with numpy 1, which has silently computed other things from some graphs."""
    here = dict(np.load(made[1]))
    if "tflite" not in runtimes_of(here):
        pytest.skip(f"{made[0]} has no graph for TFLite")
    target = install_on_this_machine(tmp_path / "sdk", wheels, "kinflow[tflite-runtime]")
    assert (target / "tflite_runtime").is_dir()
    there = repeated(pi, Sdk({target: "/sdk"}, {"PYTHONPATH": "/sdk"}), *made)
    outputs = [name for name in here if name.startswith("run/tflite/")]
    for name in outputs:
        one, other = here[name].ravel(), there[name].ravel()
        cosine = float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        print(f"\ntflite-runtime: {made[0].parent.name} {name}: cosine {cosine:.4f}")
        assert cosine >= COSINE, name
    exact = {name: value for name, value in here.items() if not name.startswith("run/")}
    compare(exact, {name: value for name, value in there.items() if not name.startswith("run/")}, set())


def test_the_comparison_can_fail(made: tuple[Path, Path]) -> None:
    """One wrong byte of a payload, one wrong logit, one missing runtime: each is noticed."""
    here = dict(np.load(made[1]))
    names = [next(name for name in here if name.startswith(kind)) for kind in ("payload/", "run/onnx/")]
    for name in names:
        wrong = dict(here)
        wrong[name] = here[name] + 1
        with pytest.raises(AssertionError):
            compare(here, wrong, runtimes_of(here))
    with pytest.raises(AssertionError):
        compare(here, {name: value for name, value in here.items() if "run/onnx" not in name}, runtimes_of(here))


def test_every_committed_bundle_is_here() -> None:
    """At least the one family that every checkout has."""
    assert ROOT / "families/fashion/bundle" in FAMILIES
