"""The programs in examples/ do what they say, against a real edge server where they take one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from kinflow import idx
from kinflow.fleet import Fleet

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "families/fashion/bundle"
SAMPLES = ROOT / "families/fashion/samples/images-idx3-ubyte.gz"


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with Fleet([BUNDLE]) as fleet:
        yield fleet.start("edge", "--no-advertise").broker


def test_every_example_is_run_here() -> None:
    """An example without a test in this file would rot."""
    here = Path(__file__).read_text(encoding="utf-8")
    for example in (ROOT / "examples").glob("*.py"):
        assert f'run("{example.name}"' in here


def test_classify_folder_prints_a_line_per_picture(tmp_path: Path) -> None:
    """Pictures are classified in the order of their names, and a file that is none is named and skipped."""
    for number, image in enumerate(idx.read(SAMPLES)[:3]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    done = run("classify_folder.py", BUNDLE, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(0 < float(row[2]) <= 1 and row[3] in ("device", "edge", "cloud") for row in rows)
    assert "notes.txt" in done.stderr


def test_asyncio_app_answers_all_and_uses_the_server(broker: str) -> None:
    """64 images go in, 64 answers come out, some of them the edge server's."""
    done = run("asyncio_app.py", BUNDLE, SAMPLES, broker)
    assert done.returncode == 0, done.stderr
    counts = {tier: int(count) for tier, count in (line.split("\t") for line in done.stdout.splitlines())}
    assert sum(counts.values()) == 64
    assert counts["edge"] > 0


def test_frame_budget_uses_every_slot() -> None:
    """Each frame is answered or skipped; at a leisurely rate few are skipped."""
    done = run("frame_budget.py", BUNDLE, SAMPLES, "30")
    assert done.returncode == 0, done.stderr
    frames, degraded, late = (int(word) for word in done.stdout.split() if word.isdigit())
    assert frames == 60
    assert 0 <= degraded <= frames
    assert late < 30


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_say_how_to_call_them(example: Path) -> None:
    """Without arguments an example prints its usage and fails."""
    done = run(example.name)
    assert done.returncode == 1
    assert f"examples/{example.name}" in done.stderr
