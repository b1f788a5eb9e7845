"""What a text is made of, and what it cost."""

from __future__ import annotations

from typing import Literal

import msgspec

from kinflow.messages import Tier

Mode = Literal["exact", "family", "confident", "local"]
Finish = Literal["", "stop", "length"]


class Token(msgspec.Struct, frozen=True):
    """One token of the text."""

    id: int
    text: str
    """What it adds to the text; empty while a character is not whole."""
    tier: Tier
    """Who said it first: the device whose draft stood, or the server that knew better."""
    probability: float
    """By the exit that decided."""
    verified: bool
    """False: the device's own exit alone decided."""


class Summary(msgspec.Struct):
    """What a text cost; it grows while the text does."""

    mode: Mode
    prompt_tokens: int = 0
    tokens: dict[Tier, int] = msgspec.field(default_factory=lambda: {"device": 0, "edge": 0, "cloud": 0})
    """By tier."""
    unverified: int = 0
    """Of the device's tokens, those that no server saw before they were shown."""
    drafted: int = 0
    """Drafts that were sent."""
    accepted: int = 0
    """Of them, those that stood."""
    refused: int = 0
    """Of them, those that did not after a past that stood; the rest were superseded, and nobody looked at them."""
    verifications: int = 0
    passes: int = 0
    """Forward passes of the servers."""
    layer_tokens: int = 0
    """Layers times positions that the servers computed, the prompt's apart."""
    redone: int = 0
    """Positions that a server decided from token ids (`exact`)."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    first_token_s: float = 0.0
    servers: list[str] = []
    """Nodes that held the session, in their order."""
    finish: Finish = ""
    degraded: bool = False
    """Some token is not what the mode promises; `reason` says why."""
    reason: str = ""

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(self.tokens.values())
