"""Runs the demo and draws what it shows: `python docs/make_demo_picture.py [--images N] [--out FILE.svg]`.

Everything in the picture comes from that run; only the live table is drawn once, as it stands at the end.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from kinflow.cli import demo

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 104


def draw(images: int, out: Path) -> None:
    """Write the picture of a demo with so many images."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())

    @contextmanager
    def once(total: int, console: Console, **_: object) -> Iterator[Any]:
        view = demo._View(total, console)
        yield view
        console.print(view)

    vars(demo).update(Console=lambda **_: console, _live=once)
    demo.demo(family=ROOT / demo.FAMILY, images=images, backend="onnx", deadline=1.0, as_json=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = console.export_svg(title="make demo", unique_id="demo")
    # A reader of the page must not be sent elsewhere for a font.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    out.write_text(re.sub(r"<!--.*?-->|[ \t]+$", "", picture, flags=re.MULTILINE) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/demo.svg")
    chosen = parser.parse_args()
    draw(chosen.images, chosen.out)
