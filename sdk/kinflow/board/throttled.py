"""The Raspberry Pi firmware's word of undervoltage and throttling.

Bits as in Raspberry Pi's documentation of `vcgencmd get_throttled`: 0 to 3 hold now, 16 to 19 since the boot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kinflow.errors import InputError

_FLAGS = ("undervoltage", "frequency capped", "throttled", "soft temperature limit")
_SINCE_BOOT = 16


@dataclass(frozen=True)
class Throttled:
    """Names out of: undervoltage, frequency capped, throttled, soft temperature limit."""

    now: tuple[str, ...] = ()
    since_boot: tuple[str, ...] = ()


def parse(text: str) -> Throttled:
    """From `throttled=0x50005` (vcgencmd) or `50005` (sysfs). Raises InputError for anything else."""
    found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})", text.strip())
    if found is None:
        raise InputError(f"get_throttled says {text.strip()[:40]!r}, expected a hexadecimal number")
    bits = int(found[1], 16)
    now = tuple(name for place, name in enumerate(_FLAGS) if bits >> place & 1)
    since_boot = tuple(name for place, name in enumerate(_FLAGS, _SINCE_BOOT) if bits >> place & 1)
    return Throttled(now, since_boot)
