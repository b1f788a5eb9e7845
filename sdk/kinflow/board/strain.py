"""BoardState -> how hard pressed the board is. Pure; policy.py says what follows from it."""

from __future__ import annotations

from kinflow.board.state import BoardState
from kinflow.policy import Strain

# Heat counts from so far below the limit on, load from full cores to twice that.
_WARMING_C = 10.0
_FULL_LOAD = 1.0
_RELAXED = Strain(0.0, "")


def judge(state: BoardState) -> Strain:
    """The worst of heat, throttling and load. Power is reported, not judged: what radio costs is not known here."""
    strains = [_RELAXED]
    if state.temperature_c is not None:
        share = (state.temperature_c - (state.limit_c - _WARMING_C)) / _WARMING_C
        strains.append(_strain(share, f"the board is at {state.temperature_c:.0f} °C of {state.limit_c:.0f}"))
    if state.load is not None:
        share = state.load / _FULL_LOAD - 1
        strains.append(_strain(share, f"{state.load:.1f} tasks wait for each core"))
    if state.throttled is not None and state.throttled.now:
        strains.append(Strain(1.0, f"the board is slowed down: {', '.join(state.throttled.now)}"))
    return max(strains, key=lambda strain: strain.share)


def _strain(share: float, reason: str) -> Strain:
    return Strain(min(share, 1.0), reason) if share > 0 else _RELAXED
