"""The build command where little is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kinflow.errors import BackendError, SettingsError
from kinflow_builder.cli import build

FASHION = Path(__file__).parents[1] / "families" / "fashion"


def test_import_needs_no_torch() -> None:
    """Command, recipe, data, codecs and measuring load neither torch nor scipy."""
    code = (
        "import sys, kinflow_builder.cli, kinflow_builder.data, kinflow_builder.measure, kinflow_builder.codecs\n"
        "print(sorted({'torch', 'scipy', 'matplotlib', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_missing_torch_is_named() -> None:
    """Without torch the command says what it needs and which pip install brings it."""
    with pytest.raises(BackendError, match=r"torch.*pip install 'kinflow\[builder\]'"):
        build(FASHION)


def test_folder_without_a_recipe(tmp_path: Path) -> None:
    """The folder is looked at before anything else is asked for."""
    with pytest.raises(SettingsError, match=r"recipe\.toml"):
        build(tmp_path)
