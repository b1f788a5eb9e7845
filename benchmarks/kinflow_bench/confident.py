"""`bench generate`: mode `confident`. What leaves early, and how often it is not what the largest member would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kinflow.text.summary import Summary
from kinflow_bench.identity import Bench, generate


def confident(bench: Bench, asked: Sequence[list[int]], tokens: int) -> tuple[dict[str, Any], list[Summary]]:
    """Greedy texts after each prompt; and what they cost.

    A token that left early disagrees where the largest member, after the same text, would say another one.
    """
    largest = bench.references.by_mode["exact"]

    def one(prompt: list[int]) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            said, summary = generate(bench.device, prompt, tokens, "confident")
            theirs = largest.choices(prompt, [token.id for token in said])
            wrong = sum(mine.id != other for mine, other in zip(said, theirs, strict=True) if not mine.verified)
            return {"wrong": wrong, "summary": msgspec.to_builtins(summary)}

        return dict(bench.shelf.get(["confident", bench.references.family, prompt, tokens], found))

    wrong, summaries = 0, []
    for number, row in enumerate(bench.each(one, asked)):
        wrong += row["wrong"]
        summaries.append(msgspec.convert(row["summary"], Summary))
        bench.steps.say(f"confident text {number + 1} of {len(asked)}: {wrong} tokens left that are not the largest's")
    count = max(1, sum(summary.count for summary in summaries))
    certificate = next(iter(bench.device.family.manifest.exits.values())).certificate
    figures = {
        "unverified_share": sum(summary.unverified for summary in summaries) / count,
        "disagreement": wrong / count,
        "certified": None if certificate is None else msgspec.to_builtins(certificate),
    }
    return figures, summaries
