"""The SDK's own tests on an emulated Cortex-A72, those that need neither a server nor the builder."""

from __future__ import annotations

import re

from emulator import Board

from conftest import ROOT, Sdk

# What runs in seconds under emulation and touches bytes, floats, files or the board. `kinflow device` and `tune`
# run where the boards' READMEs are followed.
MODULES = (
    *("backends", "board", "codec", "confidence", "frame", "idx", "images", "messages", "packet", "policy"),
    *("preprocess", "settings", "topics"),
)


def test_the_sdks_tests_pass_on_the_board(pi: Board, sdk: Sdk) -> None:
    """The same files as on this machine; only a few examples each where hypothesis makes them up."""
    said = pi.run(
        *("python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600", "-x"),
        *(f"/kinflow/tests/test_{name}.py" for name in MODULES),
        # It sets a PYTHONPATH of its own; here kinflow is found by that.
        *("-k", "not a_runtime_that_does_not_load"),
        binds=sdk.binds,
        environment={**sdk.environment, "HYPOTHESIS_PROFILE": "board"},
    )
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) >= 200, said[-300:]


def test_every_module_is_there() -> None:
    """A test file that was renamed must not drop out unnoticed."""
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in MODULES)
