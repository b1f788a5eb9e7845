"""docs/settings.md is what docs/make_settings.py makes of the settings now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kinflow import settings

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs/make_settings.py"
PAGE = (ROOT / "docs/settings.md").read_text(encoding="utf-8")


def test_page_is_not_stale() -> None:
    """The committed page is the one that the script would write."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False, timeout=60)
    assert done.returncode == 0, "run: python docs/make_settings.py"


@pytest.mark.parametrize(
    "kind",
    [settings.DeviceSettings, settings.ServerSettings, settings.BrokerSettings, settings.TlsSettings],
    ids=lambda kind: kind.__name__,
)
def test_every_key_has_a_row_with_words(kind: type[settings.DeviceSettings]) -> None:
    """Each key stands in a table with a type, a default and a meaning."""
    rows = {line.split("`")[1].strip("[]"): line for line in PAGE.splitlines() if line.startswith("| `")}
    for key in kind.__struct_fields__:
        cells = [cell.strip() for cell in rows[key].strip("|").split("|")]
        assert len(cells) == 4
        assert all(cells), key
        assert cells[3].endswith("."), key


def test_search_paths_are_those_of_the_page() -> None:
    """Where files are looked for stands on the page in the same order."""
    wanted = ["./kinflow-<role>.toml", "~/.config/kinflow/<role>.toml", "/etc/kinflow/<role>.toml"]
    positions = [PAGE.index(path) for path in wanted]
    assert positions == sorted(positions)
    looked_at = [str(path) for path in settings.search_paths("edge")]
    expected = [path.replace("<role>", "edge").replace("~", str(Path.home())).removeprefix("./") for path in wanted]
    assert looked_at == expected
