"""Names of class folders -> the indices of the labels they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kinflow.errors import InputError

# The class's index at the beginning of a folder's or a file's name.
INDEX = re.compile(r"(\d+)(?:[_\s.-].*)?")


def match(names: Sequence[str], classes: Sequence[str], root: Path) -> list[int]:
    """The index of each folder's class: all by name, or else all by the index that their names begin with.

    Case, blanks, `_` and `-` do not matter in a name, and of a label such as "tench, Tinca tinca" one part is
    enough. Raises InputError that names the folders that fit no label, or more than one.
    """
    known: dict[str, set[int]] = {}
    for index, label in enumerate(classes):
        for form in {label, *label.split(",")}:
            known.setdefault(_plain(form), set()).add(index)
    by_name = [known.get(_plain(name), set()) for name in names]
    by_index = [_index_of(name, len(classes)) for name in names]
    if all(len(found) == 1 for found in by_name):
        indices = [next(iter(found)) for found in by_name]
    elif all(found is not None for found in by_index):
        indices = [found for found in by_index if found is not None]
    else:
        odd = [name for name, found in zip(names, by_name, strict=True) if len(found) != 1]
        raise InputError(
            f"{root}: {len(odd)} of {len(names)} folders fit none of the labels, or several: {some(odd)}; "
            f"expected names such as {some(classes)}, or indices from 0 to {len(classes) - 1}"
        )
    if len(set(indices)) < len(indices):
        twice = sorted({name for name, index in zip(names, indices, strict=True) if indices.count(index) > 1})
        raise InputError(f"{root}: more than one folder is of the same label: {some(twice)}")
    return indices


def _index_of(name: str, count: int) -> int | None:
    found = INDEX.fullmatch(name)
    return int(found[1]) if found is not None and int(found[1]) < count else None


def _plain(name: str) -> str:
    # A folder's name cannot hold a slash, a label can: "T-shirt/top".
    return re.sub(r"[\s_/-]+", " ", name).strip().casefold()


def some(names: Sequence[str]) -> str:
    """The first five, for a message."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown}, …"
