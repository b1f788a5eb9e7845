"""Stop sequences in a text that comes piece by piece. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Lets text through up to the first stop sequence; what may be the beginning of one waits for more."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = sequences
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What can be shown now."""
        text = self._held + piece
        ends = [at for sequence in self._sequences if (at := text.find(sequence)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        begun = max((_overlap(text, sequence) for sequence in self._sequences), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def rest(self) -> str:
        """What was held back when the text has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, sequence: str) -> int:
    """How many characters of the text's end are the beginning of `sequence`."""
    longest = min(len(text), len(sequence) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(sequence[:size])), 0)
