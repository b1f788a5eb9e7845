"""Makes a struct ready for several threads."""

from __future__ import annotations

from typing import TypeVar

import msgspec

S = TypeVar("S")


def ready(kind: type[S]) -> type[S]:
    """Decorates a struct that is decoded or converted to: msgspec looks at its fields now, on the thread that imports.

    It would do so at the first use, and msgspec 0.22 crashes the process where two threads are first at the same time.
    """
    msgspec.json.Decoder(kind)
    return kind
