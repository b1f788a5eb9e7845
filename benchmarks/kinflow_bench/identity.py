"""`bench generate`: are texts what they promise to be? Token by token against plain decoding, and in distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from kinflow.errors import LinkError
from kinflow.text.device import TextDevice
from kinflow.text.family import TextFamily
from kinflow.text.manifest import LOWER
from kinflow.text.sampling import GREEDY
from kinflow.text.summary import Summary, Token
from kinflow_bench.progress import Steps
from kinflow_bench.reference import Reference
from kinflow_bench.shelf import Shelf

Item = TypeVar("Item")
Promise = Literal["exact", "family"]
PROMISES: tuple[Promise, ...] = ("exact", "family")
TRIES = 3
# Of the chi-square test: values that are expected more seldom are counted together.
SELDOM = 5
TEMPERATURE = 0.7


class References:
    """What each mode promises: the largest member alone, and the composed model."""

    def __init__(self, family: TextFamily) -> None:
        split = family.manifest.segments[LOWER].result
        codec = family.codec(split, next(iter(family.manifest.splits[split].codecs)))
        self.by_mode: dict[Promise, Reference] = {
            "exact": Reference(family),
            "family": Reference(family, "int8", codec),
        }
        self.stop_tokens = family.manifest.stop_tokens
        self.family = hashlib.sha256(family.raw_manifest).hexdigest()
        """Names the bundle on the shelf."""


@dataclass(frozen=True)
class Bench:
    """What texts are made and compared with."""

    device: TextDevice
    references: References
    shelf: Shelf
    parallel: int
    """Texts side by side."""
    steps: Steps

    def each(self, one: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[Any]:
        """What `one` makes of each, in order; every one is a step."""
        with ThreadPoolExecutor(self.parallel) as pool:
            for made in pool.map(one, items):
                self.steps.advance()
                yield made


def compare(
    bench: Bench, asked: Sequence[list[int]], tokens: int
) -> tuple[dict[str, Any], dict[Promise, list[Summary]]]:
    """Greedy texts after each prompt; and what the generated ones cost."""

    def both(prompt: list[int]) -> dict[Promise, Any]:
        return {mode: _one(bench, prompt, tokens, mode) for mode in PROMISES}

    rows: list[dict[Promise, Any]] = []
    equal = dict.fromkeys(PROMISES, 0)
    differences: list[dict[str, Any]] = []
    for number, row in enumerate(bench.each(both, asked)):
        rows.append(row)
        for mode in PROMISES:
            at = row[mode]["differs_at"]
            equal[mode] += at is None
            if at is not None:
                differences.append({"mode": mode, "prompt": number, "at": at, "margin": row[mode]["margin"]})
        counts = ", ".join(f"{mode} {count}" for mode, count in equal.items())
        bench.steps.say(f"text {number + 1} of {len(asked)}: equal so far {counts}")
    summaries = {mode: [msgspec.convert(row[mode]["summary"], Summary) for row in rows] for mode in PROMISES}
    figures = {
        "generations": len(asked),
        "tokens": tokens,
        "identical": equal["exact"],
        "identical_family": equal["family"],
        "differences": differences,
    }
    return figures, summaries


def _one(bench: Bench, prompt: list[int], tokens: int, mode: Promise) -> dict[str, Any]:
    references, shelf = bench.references, bench.shelf
    about = [references.family, prompt, tokens, mode]

    def plain() -> dict[str, Any]:
        text = references.by_mode[mode].decode(prompt, tokens, GREEDY)
        return {"tokens": text.tokens, "margins": text.margins}

    def generated() -> dict[str, Any]:
        said, summary = generate(bench.device, prompt, tokens, mode)
        return {"tokens": [token.id for token in said], "summary": msgspec.to_builtins(summary)}

    reference = shelf.get(["reference", *about], plain)
    mine = shelf.get(["generated", *about], generated)
    at = first_difference(mine["tokens"], reference["tokens"], references.stop_tokens)
    margins = reference["margins"]
    margin = margins[at] if at is not None and at < len(margins) else None
    return {"differs_at": at, "margin": margin, "summary": mine["summary"]}


def generate(
    device: TextDevice, prompt: list[int], tokens: int, mode: Any, max_drafts: int | None = None, **sampling: Any
) -> tuple[list[Token], Summary]:
    """A text that is all that its mode promises. Raises LinkError where no try gives one."""
    for _ in range(TRIES):
        generation = device.continue_from(prompt, max_tokens=tokens, mode=mode, max_drafts=max_drafts, **sampling)
        said = list(generation)
        if not generation.summary.degraded:
            return said, generation.summary
    raise LinkError(f"a text is degraded: {generation.summary.reason}")


def first_difference(generated: Sequence[int], reference: Sequence[int], stop_tokens: Sequence[int]) -> int | None:
    """Where two texts part; None where they do not. The reference may end in a stop token."""
    wanted = [token for token in reference if token not in stop_tokens]
    if list(generated) == wanted:
        return None
    pairs = enumerate(zip(generated, wanted, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(generated), len(wanted)))


def distribution(bench: Bench, asked: Sequence[list[int]], samples: int) -> dict[str, Any]:
    """Chi-square of sampled tokens against the reference's own distribution, by mode and prompt.

    Each sample is the first token of a text of two: a draft for it goes up with the prompt.
    """
    references = bench.references
    found: dict[str, list[float]] = {}
    for mode in PROMISES:
        for number, prompt in enumerate(asked):
            logits = references.by_mode[mode].logits(prompt)
            weights = np.exp((logits - logits.max()).astype(float) / TEMPERATURE)

            def sample(seed: int, prompt: list[int] = prompt, mode: Promise = mode) -> int:
                def token() -> int:
                    said, _ = generate(bench.device, prompt, 2, mode, temperature=TEMPERATURE, seed=seed)
                    return said[0].id if said else -1

                return int(bench.shelf.get(["sample", references.family, prompt, mode, TEMPERATURE, seed], token))

            drawn = list(bench.each(sample, range(samples)))
            found.setdefault(mode, []).append(p_value(drawn, weights / weights.sum(), references.stop_tokens))
            bench.steps.say(f"samples of prompt {number + 1} of {len(asked)}, {mode}: p = {found[mode][-1]:.3f}")
    tests = sum(len(values) for values in found.values())
    smallest = min(min(values) for values in found.values())
    # So many tests: one of them is below 1% by chance more often than a single one would be (Bonferroni).
    return {
        "p_values": found,
        "samples": samples,
        "temperature": TEMPERATURE,
        "rejected_at_1%": smallest * tests < 0.01,
    }


def p_value(drawn: Sequence[int], expected: Any, stop_tokens: Sequence[int]) -> float:
    """That tokens drawn from `expected` [vocabulary] differ from it as much as these do. An empty text is -1."""
    from scipy.stats import chisquare

    counts = np.zeros(len(expected) + 1)
    np.add.at(counts, np.asarray(drawn), 1)
    wanted = np.append(expected, 0.0) * len(drawn)
    for token in stop_tokens:  # a text that ends at once has no token
        wanted[-1] += wanted[token]
        wanted[token] = 0.0
    likely = wanted >= SELDOM
    observed, predicted = list(counts[likely]), list(wanted[likely])
    if wanted[~likely].sum() > 0:
        observed.append(counts[~likely].sum())
        predicted.append(wanted[~likely].sum())
    return float(chisquare(observed, predicted).pvalue) if len(observed) > 1 else 1.0
