"""Which drafts stand, and what comes after them. Pure.

The server chooses its own token at each position, with the noise that the device drafted with; a draft stands when
it is that token (see kinflow.text.sampling). So what it says is what it would have said alone.
"""

from __future__ import annotations

from typing import NamedTuple

from kinflow.text.sampling import Choice, Sampling, certain, choose
from kinflow_edge.text.model import Array, Ids


class Ruling(NamedTuple):
    """What became of the drafts."""

    choices: tuple[Choice, ...]
    """The server's own, of each draft that stands and of the position after them."""
    doubtful: bool
    """Logits that are off by as much as the bound could have decided otherwise."""

    @property
    def accepted(self) -> int:
        return len(self.choices) - 1


def rule(
    drafts: Ids, confirmed: int, logits: Array, sampling: Sampling, known: Choice | None = None, bound: float = 0.0
) -> Ruling:
    """Walk the drafts, whose first position is `confirmed`, as far as they stand.

    `logits`: [positions, vocabulary], of the positions from `confirmed` to the one after the last draft; without the
    first one where its choice is `known`. `bound`: by how much each may be off.
    """
    choices: list[Choice] = [] if known is None else [known]
    missing = len(choices)
    doubtful = False
    for at in range(len(drafts) + 1):
        if at >= missing:
            row = logits[at - missing]
            choices.append(choose(row, sampling, confirmed + at))
            doubtful = doubtful or (bound > 0 and not certain(row, sampling, confirmed + at, bound))
        if at == len(drafts) or drafts[at] != choices[at].token:
            break
    return Ruling(tuple(choices), doubtful)
