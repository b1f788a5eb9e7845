"""What a long benchmark has found already: a file that it goes on from when it was stopped."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Shelf:
    """One JSON line per finding, appended as soon as it is there. For several threads."""

    def __init__(self, path: Path | None) -> None:
        """Without a path nothing is kept."""
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path is not None and path.exists() else ""
        whole, _, half = text.rpartition("\n")
        if path is not None and half:  # it was stopped in the middle of this line
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for line in whole.splitlines():
            found = json.loads(line)
            self._found[found["key"]] = found["value"]

    def get(self, about: Any, find: Callable[[], Any]) -> Any:
        """What is known `about` this (anything that JSON has), else what `find` finds now."""
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        with self._lock:
            if key in self._found:
                return self._found[key]
        value = find()
        with self._lock:
            self._found[key] = value
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"key": key, "value": value}) + "\n")
        return value
