"""Which drafts stand, and what comes after them. Pure.

The server chooses its own token at each position, with the noise that the device drafted with; a draft stands when
it is that token (see kinflow.text.sampling). So what it says is what it would have said alone.
"""

from __future__ import annotations

from typing import NamedTuple

from kinflow.text.sampling import Choice, Sampling, choose
from kinflow_edge.text.model import Array, Ids


class Ruling(NamedTuple):
    """What became of the drafts."""

    choices: tuple[Choice, ...]
    """The server's own, of each draft that stands and of the position after them."""
    margin: float
    """The smallest of theirs: an error of less than half of it in the logits changes nothing."""

    @property
    def accepted(self) -> int:
        return len(self.choices) - 1


def rule(drafts: Ids, confirmed: int, logits: Array, sampling: Sampling, known: Choice | None = None) -> Ruling:
    """Walk the drafts, whose first position is `confirmed`, as far as they stand.

    `logits`: [positions, vocabulary], of the positions from `confirmed` to the one after the last draft; without the
    first one where its choice is `known`.
    """
    choices: list[Choice] = [] if known is None else [known]
    missing = len(choices)
    for at in range(len(drafts) + 1):
        if at >= missing:
            choices.append(choose(logits[at - missing], sampling, confirmed + at))
        if at == len(drafts) or drafts[at] != choices[at].token:
            break
    return Ruling(tuple(choices), min(choice.margin for choice in choices[missing:] or choices))
