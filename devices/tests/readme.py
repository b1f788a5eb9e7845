"""The lines that a board's README has a user type, and what they need that no emulator has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conftest import ROOT

# A line that needs one of these says so behind it: `kinflow device v4l2:/dev/video0 # needs a camera`.
NEEDS = ("a camera", "a network", "JetPack", "systemd")


@dataclass(frozen=True)
class Line:
    """One line of a block of shell."""

    section: str
    words: str
    needs: str
    """One of NEEDS; empty where an emulated board has all of it."""


def lines(board: str) -> list[Line]:
    """Every shell line of the page, in its order. Raises ValueError for a need that nobody knows."""
    page = (ROOT / "devices" / board / "README.md").read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
            for line in block.splitlines():
                words, _, needs = line.partition(" # needs ")
                if needs and needs not in NEEDS:
                    raise ValueError(f"{board}: {line!r} needs {needs!r}, expected one of {', '.join(NEEDS)}")
                found.append(Line(section.splitlines()[0], words, needs))
    return found
