"""What a device does otherwise under strain: it leaves at a split before its exit, and says why it asked at all."""

from __future__ import annotations

from msgspec.structs import replace

from kinflow.answer import Answer
from kinflow.family import Family, Member
from kinflow.policy import EARLY_SHARE, Offload, Rate, Strain, leave_early, rates
from kinflow.uplink import Uplink


class EarlySplits:
    """The splits that a member passes on the way to its exit, and how features may leave there."""

    def __init__(self, family: Family, member: Member, codec: str) -> None:
        """`codec`: the settings' one, for the splits that have it; else a split's own."""
        self._rates: dict[str, tuple[Rate, ...]] = {}
        for name in member.early_splits:
            split = family.manifest.splits[name]
            self._rates[name] = rates(split, codec if codec in split.codecs else "")

    def choose(self, strain: Strain, uplink: Uplink, remaining_s: float) -> Offload | None:
        """The earliest split that a server takes in time; None where the device goes on to its exit."""
        if strain.share < EARLY_SHARE:
            return None
        for split, ways in self._rates.items():
            if (chosen := leave_early(strain, split, uplink.routes(split, ways), remaining_s)) is not None:
                return chosen
        return None


def explained(answer: Answer, strain: Strain) -> Answer:
    """Of an answer that was sure enough to be kept at ease: so not degraded where nobody else could give one."""
    if answer.tier == "device":
        reason = f"confident; kept although {strain.reason}: {answer.reason}"
        return replace(answer, degraded=False, reason=reason)
    return replace(answer, reason="; ".join(filter(None, (answer.reason, f"offloaded because {strain.reason}"))))
