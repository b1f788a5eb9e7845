"""`bench generate`: what texts promise, and what they cost, over real processes and shaped links."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kinflow.address import parse_all
from kinflow.errors import LinkError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings, TextSettings
from kinflow.text.device import TextDevice
from kinflow.text.family import TextFamily
from kinflow.text.remote import Way
from kinflow.text.sampling import GREEDY
from kinflow.text.summary import Mode, Summary
from kinflow_bench import breakeven
from kinflow_bench.confident import confident
from kinflow_bench.identity import Bench, References, compare, distribution, generate
from kinflow_bench.progress import Steps
from kinflow_bench.prompts import prompts
from kinflow_bench.reference import Reference, Text
from kinflow_bench.shaping import Shape, ShapingProxy
from kinflow_bench.shelf import Shelf
from kinflow_bench.throttle import Throttle

# The share of a core that a busy server has left for one user.
BUSY_SHARE = 0.25
# Costs of a text of which nothing is drafted.
WITHOUT_DRAFTS = ("layer_tokens_ratio", "passes_per_token", "bytes_up_per_token")
# On a machine that others use too a pass may take long; a text that gives a server up would compare nothing.
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Extent:
    """How much of it."""

    prompts: int
    """Texts compared."""
    tokens: int
    """Of each."""
    timed: int
    """So many of them, evenly spread, are timed; 0: none."""
    sampled: int
    """The first so many are sampled from; 0: none."""
    samples: int
    """From each of them."""
    round_trips_ms: Sequence[float]
    parallel: int
    """Texts compared side by side."""

    @property
    def steps(self) -> int:
        """Of the progress bar: texts, compared and `confident`, samples, and timed texts over each link."""
        return 2 * self.prompts + 2 * self.sampled * self.samples + 2 * self.timed * len(self.round_trips_ms)


class ByFeatures(TextDevice):
    """In `exact` it sends features however slow the link seems: from token ids the promise would be easy to keep."""

    def _way(self, mode: Mode) -> Way:
        return (self._exact_features if mode == "exact" else None) or super()._way(mode)


def run(
    bundle: Path, extent: Extent, data: Path | None, state: Path | None, plot: Path | None, steps: Steps
) -> dict[str, Any]:
    """`state`: keeps what is compared, to go on from. `plot`: gets the break-even."""
    family = TextFamily.load(bundle)
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet([bundle]))
        server = fleet.start("edge", "--member", family.manifest.last_exit(), "--no-advertise")
        address = parse_all(server.broker)[0]
        proxy = stack.enter_context(ShapingProxy(address.host, address.port))
        settings = DeviceSettings(broker=proxy.address, text=TextSettings(verify_timeout_s=PATIENCE_S))
        device = stack.enter_context(ByFeatures.open(bundle, settings))
        if not device.wait_for_server(60.0):
            raise LinkError(f"no server at {server.broker}")
        texts = prompts(max(extent.prompts, extent.timed, extent.sampled), data)
        asked = [device.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        usual_ms = sorted(extent.round_trips_ms)[len(extent.round_trips_ms) // 2]
        proxy.shape = Shape(delay_s=usual_ms / 2e3)
        bench = Bench(device, References(family), Shelf(state), extent.parallel, steps)
        figures = _untimed(bench, asked, extent)
        figures["conditions"] = {
            "round_trip_ms": usual_ms,
            "texts_side_by_side": extent.parallel,
            "sampling": "greedy",
            "exact_by": "float16 features",
            "server": "one process with all upper layers",
        }
        if extent.timed:
            largest = stack.enter_context(Largest(bundle))
            # Spread over all: neighbours ask about the same thing.
            timed = [asked[place] for place in np.linspace(0, len(asked) - 1, extent.timed).astype(int)]
            timing = Timing(device, server, proxy, largest, timed, extent, family.manifest.layers, steps)
            figures |= timing.run(plot)
    return figures


def _untimed(bench: Bench, asked: Sequence[list[int]], extent: Extent) -> dict[str, Any]:
    """Whether texts are what they promise to be, and what of them does not hang on the link."""
    layers, compared = bench.device.family.manifest.layers, asked[: extent.prompts]
    figures, summaries = compare(bench, compared, extent.tokens)
    figures |= costs(summaries["family"], layers) | {"exact": costs(summaries["exact"], layers)}
    certain, early = confident(bench, compared, extent.tokens)
    spent = costs(early, layers)
    figures["confident"] = certain | {name: spent[name] for name in WITHOUT_DRAFTS}
    if extent.sampled:
        figures["distribution"] = distribution(bench, asked[: extent.sampled], extent.samples)
    return figures


def costs(summaries: Sequence[Summary], layers: int) -> dict[str, Any]:
    """Per generated token; the prompt's own cost is the same for everybody and left out."""
    count = max(1, sum(summary.count for summary in summaries))
    accepted = sum(summary.accepted for summary in summaries)
    return {
        "layer_tokens_ratio": sum(summary.layer_tokens for summary in summaries) / (layers * count),
        "passes_per_token": sum(summary.verifications for summary in summaries) / count,
        "acceptance": accepted / max(1, sum(summary.drafted for summary in summaries)),
        "acceptance_decided": accepted / max(1, accepted + sum(summary.refused for summary in summaries)),
        "bytes_up_per_token": sum(summary.bytes_up for summary in summaries) / count,
        "drafted_share": sum(summary.tokens["device"] for summary in summaries) / count,
        "redone_share": sum(summary.redone for summary in summaries) / count,
    }


class Largest:
    """The largest member alone, in a process of its own: so that it can be slowed down as a server is."""

    def __init__(self, bundle: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve_largest, args=(bundle, there), daemon=True)

    def __enter__(self) -> Largest:
        self._process.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._here.send(None)
        self._process.join()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def decode(self, prompt: Sequence[int], tokens: int) -> Text:
        """Greedily."""
        self._here.send((list(prompt), tokens))
        return Text(*self._here.recv())


def _serve_largest(bundle: Path, there: Connection) -> None:
    reference = Reference(TextFamily.load(bundle))
    while (asked := there.recv()) is not None:
        prompt, tokens = asked
        there.send(tuple(reference.decode(prompt, tokens, GREEDY)))


class Row(NamedTuple):
    """One text, each way; seconds per token after the first one."""

    family: float
    confident: float
    cloud_only: float
    naive: float | None
    cost: Summary


@dataclass(frozen=True)
class Timing:
    """Times over each link: as it is, with a round trip for every token, and by the largest member alone."""

    device: TextDevice
    server: ServerProcess
    proxy: ShapingProxy
    largest: Largest
    asked: Sequence[list[int]]
    extent: Extent
    layers: int
    steps: Steps

    def run(self, plot: Path | None) -> dict[str, Any]:
        links: dict[str, Any] = {}
        measured: list[breakeven.Measured] = []
        whole_s: list[float] = []
        ways_s: list[float] = []
        """A token's features and a pass, one behind the other."""
        for round_trip_ms in self.extent.round_trips_ms:
            for share in (1.0, BUSY_SHARE):
                rows = self._link(round_trip_ms, share)
                if share == 1:
                    whole_s += [row.cloud_only for row in rows]
                    ways_s += [row.naive - round_trip_ms / 1e3 for row in rows if row.naive is not None]
                name = f"{round_trip_ms:g} ms" + ("" if share == 1 else f", server at {share:.0%}")
                link = links[name] = self._figures(rows)
                point = round_trip_ms / 1e3, share, link["drafted_share"], link["cloud_only_over_family"]
                measured.append(breakeven.Measured(*point))
                self.steps.say(f"{name}: {link}")
        self.proxy.shape = Shape()
        pace = self.device.pace
        pass_s = max(0.0, statistics.median(ways_s) - pace.features_s)
        speeds = breakeven.Speeds(pace.features_s, pace.exit_s, pass_s, statistics.median(whole_s))
        if plot is not None:
            shares = {"server at equal speed": 1.0, f"server with {BUSY_SHARE:.0%} of its time": BUSY_SHARE}
            breakeven.plot(plot, speeds, shares, measured)
        acceptance = statistics.mean(point.acceptance for point in measured)
        trips_s = [trip / 1e3 for trip in self.extent.round_trips_ms]
        return {
            "speedup_over_naive_split": _by_link(links, "naive_over_family"),
            "speedup_over_cloud_only": _by_link(links, "cloud_only_over_family"),
            "links": links,
            "timed": len(self.asked),
            "busy_share": BUSY_SHARE,
            "break_even": breakeven.figures(speeds, acceptance, trips_s, (1.0, BUSY_SHARE)),
        }

    def _link(self, round_trip_ms: float, share: float) -> list[Row]:
        self.proxy.shape = Shape(delay_s=round_trip_ms / 2e3)
        with Throttle(self.server.pid, share), Throttle(self.largest.pid, share):
            return [self._row(prompt, naive=share == 1) for prompt in self.asked]

    def _row(self, prompt: list[int], *, naive: bool) -> Row:
        tokens = self.extent.tokens
        _, summary = generate(self.device, prompt, tokens, "family")
        one_by_one = _per_token(generate(self.device, prompt, tokens, "family", 0)[1]) if naive else None
        early = _per_token(generate(self.device, prompt, tokens, "confident")[1])
        text = self.largest.decode(prompt, tokens)
        self.steps.advance()
        # Its tokens stream: the way adds to the first one alone.
        alone = text.seconds / max(1, len(text.tokens) - 1)
        return Row(_per_token(summary), early, alone, one_by_one, summary)

    def _figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Medians, of seconds and of each text's own ratios."""
        found: dict[str, Any] = {
            "family": statistics.median(row.family for row in rows),
            "confident": statistics.median(row.confident for row in rows),
            "cloud_only": statistics.median(row.cloud_only for row in rows),
            "cloud_only_over_family": statistics.median(row.cloud_only / row.family for row in rows),
            "cloud_only_over_confident": statistics.median(row.cloud_only / row.confident for row in rows),
        }
        naive = [(row.naive, row.naive / row.family) for row in rows if row.naive is not None]
        if naive:
            found["naive"] = statistics.median(seconds for seconds, _ in naive)
            found["naive_over_family"] = statistics.median(ratio for _, ratio in naive)
        return found | costs([row.cost for row in rows], self.layers)


def _per_token(summary: Summary) -> float:
    return (summary.seconds - summary.first_token_s) / max(1, summary.count - 1)


def _by_link(links: dict[str, Any], key: str) -> dict[str, float]:
    return {name: figures[key] for name, figures in links.items() if key in figures}
