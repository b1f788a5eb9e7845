"""`bench generate`: mode `confident`. What leaves early, and how often it is not what the largest member would say."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from kinflow.text.device import TextDevice
from kinflow.text.summary import Summary
from kinflow_bench.identity import References, generate
from kinflow_bench.progress import Steps
from kinflow_bench.shelf import Shelf


def confident(
    device: TextDevice,
    references: References,
    asked: Sequence[list[int]],
    tokens: int,
    shelf: Shelf,
    parallel: int,
    steps: Steps,
) -> tuple[dict[str, Any], list[Summary]]:
    """Greedy texts after each prompt, `parallel` of them side by side; and what they cost.

    A token that left early disagrees where the largest member, after the same text, would say another one.
    """
    largest = references.by_mode["exact"]

    def one(prompt: list[int]) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            said, summary = generate(device, prompt, tokens, "confident")
            theirs = largest.choices(prompt, [token.id for token in said])
            wrong = sum(mine.id != other for mine, other in zip(said, theirs, strict=True) if not mine.verified)
            return {"wrong": wrong, "summary": msgspec.to_builtins(summary)}

        return dict(shelf.get(["confident", references.family, prompt, tokens], found))

    wrong, summaries = 0, []
    with ThreadPoolExecutor(parallel) as pool:
        for number, row in enumerate(pool.map(one, asked)):
            wrong += row["wrong"]
            summaries.append(msgspec.convert(row["summary"], Summary))
            steps.advance()
            steps.say(f"confident text {number + 1} of {len(asked)}: {wrong} tokens left that are not the largest's")
    count = max(1, sum(summary.count for summary in summaries))
    certificate = next(iter(device.family.manifest.exits.values())).certificate
    figures = {
        "unverified_share": sum(summary.unverified for summary in summaries) / count,
        "disagreement": wrong / count,
        "certified": None if certificate is None else msgspec.to_builtins(certificate),
    }
    return figures, summaries
