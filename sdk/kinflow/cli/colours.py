"""A text as it is generated, coloured by who said each token, and one line of what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from kinflow.text.summary import Summary, Token

# By tier; the device's colour is for drafts that a server verified, what no server saw has none.
COLOURS = {"device": "green", "edge": "yellow", "cloud": "magenta"}
LEGEND = (
    ("device, verified", COLOURS["device"]),
    ("device, not verified", ""),
    ("edge", COLOURS["edge"]),
    ("cloud", COLOURS["cloud"]),
)


def console(file: TextIO | None = None) -> Console:
    """Colours on a terminal alone; nothing is wrapped or highlighted."""
    return Console(file=file, highlight=False, soft_wrap=True)


def legend() -> Text:
    """Which colour is whose."""
    return Text(" · ").join(Text(name, style) for name, style in LEGEND)


def piece(token: Token) -> Text:
    """What a token adds, in its colour."""
    style = "" if token.tier == "device" and not token.verified else COLOURS[token.tier]
    return Text(showable(token.text), style)


def showable(text: str) -> str:
    """A model's text must not steer a terminal."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def statistics(summary: Summary) -> Text:
    """Tokens per tier, drafts, bytes, passes, time, servers; and why it is not what the mode promises."""
    count = max(summary.count, 1)
    tiers = [f"{number} {tier}" for tier, number in summary.tokens.items() if number]
    if summary.unverified and summary.unverified < summary.tokens["device"]:
        tiers.append(f"{summary.unverified} of the device's not verified")
    elif summary.unverified:
        tiers.append("none verified")
    asked = summary.verifications > 0
    parts = [
        f"{summary.count} token{'' if summary.count == 1 else 's'}: {', '.join(tiers)}" if tiers else "no tokens",
        f"{summary.accepted} of {summary.drafted} drafts accepted" if summary.drafted else "",
        f"{summary.bytes_up / count:.0f} bytes up per token" if asked else "",
        f"{summary.passes / count:.2f} passes per token" if asked else "",
        f"{summary.seconds:.1f} s, {summary.count / max(summary.seconds, 1e-9):.1f} tokens/s",
        ", then ".join(summary.servers),
    ]
    line = Text(" · ".join(part for part in parts if part), "dim")
    if summary.degraded:
        line.append(f"\ndegraded: {showable(summary.reason)}", "yellow")
    return line
