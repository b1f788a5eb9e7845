"""Bundles to be spoiled for tests, and what loading them says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinflow.bundle import MANIFEST
from kinflow.errors import BundleError
from kinflow.family import Family

Document = dict[str, Any]
GRAPH = "trunk0.onnx"
SEGMENT0 = ("segments", "trunk0")
ONNX0 = (*SEGMENT0, "graphs", "onnx")


def edit(folder: Path, change: Callable[[Document], None]) -> Path:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))
    return folder


def put(*keys: str | int, value: object) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


def refused(path: Path) -> str:
    """What Family.load says; in a thread, so that a load that waits for ever fails here and nowhere else."""
    said: list[BaseException | None] = []

    def load() -> None:
        try:
            Family.load(path)
        except BaseException as exc:
            said.append(exc)
        else:
            said.append(None)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert said, "Family.load did not return"
    assert isinstance(said[0], BundleError), repr(said[0])
    return str(said[0])
