"""What one check of `kinflow doctor` found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """`advice` says what to do, unless all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def guarded(name: str, step: Callable[[], list[Check]]) -> list[Check]:
    """The step's checks; a step that breaks is a failed check, so that the others still run."""
    try:
        return step()
    except Exception as exc:
        return [Check(name, "fail", f"the check itself broke: {exc!r}", "please report this line")]
