"""`bench generate`: are texts what they promise to be, and what do they cost over real processes and shaped links."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kinflow.address import parse_all
from kinflow.errors import LinkError
from kinflow.fleet import Fleet, ServerProcess
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.family import TextFamily
from kinflow.text.generation import Generation
from kinflow.text.manifest import LOWER
from kinflow.text.sampling import GREEDY
from kinflow.text.summary import Mode
from kinflow_bench.prompts import prompts
from kinflow_bench.reference import Reference, Text
from kinflow_bench.shaping import Shape, ShapingProxy
from kinflow_bench.throttle import Throttle

Say = Callable[[str], None]
# The share of a core that a busy server has left for one user.
BUSY_SHARE = 0.25


def run(
    bundle: Path, count: int, tokens: int, timed: int, round_trips_ms: Sequence[float], data: Path | None, say: Say
) -> dict[str, Any]:
    """`count` prompts for the identity of texts, the first `timed` of them for times."""
    family = TextFamily.load(bundle)
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet([bundle]))
        server = fleet.start("edge", "--member", family.manifest.last_exit(), "--no-advertise")
        address = parse_all(server.broker)[0]
        proxy = stack.enter_context(ShapingProxy(address.host, address.port))
        settings = DeviceSettings(broker=proxy.address)
        device = stack.enter_context(TextDevice.open(bundle, settings))
        if not device.wait_for_server(60.0):
            raise LinkError(f"no server at {server.broker}")
        asked = [device.tokenizer.chat([{"role": "user", "content": text}]) for text in prompts(count, data)]
        largest = stack.enter_context(Largest(bundle))
        usual_ms = sorted(round_trips_ms)[len(round_trips_ms) // 2]
        proxy.shape = Shape(delay_s=usual_ms / 2e3)
        figures = {"round_trip_ms": usual_ms} | _identity(device, family, largest, asked, tokens, say)
        figures |= _times(device, server, proxy, largest, asked[:timed], tokens, round_trips_ms, say)
    return figures


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


def _identity(
    device: TextDevice, family: TextFamily, largest: Largest, asked: Sequence[list[int]], tokens: int, say: Say
) -> dict[str, Any]:
    """Text by text, against plain decoding."""
    split = family.manifest.segments[LOWER].result
    codec = family.codec(split, next(iter(family.manifest.splits[split].codecs)))
    composed = Reference(family, "int8", codec)
    differences: list[dict[str, Any]] = []
    equal = {"exact": 0, "family": 0}
    costs: dict[str, list[Any]] = {"exact": [], "family": []}
    for number, prompt in enumerate(asked):
        texts = {"exact": largest.decode(prompt, tokens), "family": composed.decode(prompt, tokens, GREEDY)}
        for mode in ("exact", "family"):
            generated, summary = _generate(device, prompt, tokens, mode)
            costs[mode].append(summary)
            at = _first_difference(generated, texts[mode].tokens, family.manifest.stop_tokens)
            equal[mode] += at is None
            if at is not None:
                margin = texts[mode].margins[at] if at < len(texts[mode].margins) else None
                differences.append({"mode": mode, "prompt": number, "at": at, "margin": margin})
        say(f"text {number + 1} of {len(asked)}: equal so far exact {equal['exact']}, family {equal['family']}")
    layers = family.manifest.layers
    return {
        "generations": len(asked),
        "tokens": tokens,
        "identical": equal["exact"],
        "identical_family": equal["family"],
        "differences": differences,
        "redone_share": sum(s.redone for s in costs["exact"]) / max(1, sum(s.count for s in costs["exact"])),
        **_costs(costs["family"], layers),
        "exact": _costs(costs["exact"], layers),
    }


def _costs(summaries: Sequence[Any], layers: int) -> dict[str, float]:
    """Per generated token; the prompt's own cost is the same for everybody and left out."""
    count = max(1, sum(summary.count for summary in summaries))
    return {
        "layer_tokens_ratio": sum(summary.layer_tokens for summary in summaries) / (layers * count),
        "passes_per_token": sum(summary.verifications for summary in summaries) / count,
        "acceptance": sum(s.accepted for s in summaries) / max(1, sum(s.drafted for s in summaries)),
        "bytes_up_per_token": sum(summary.bytes_up for summary in summaries) / count,
        "drafted_share": sum(summary.tokens["device"] for summary in summaries) / count,
    }


def _times(
    device: TextDevice,
    server: ServerProcess,
    proxy: ShapingProxy,
    largest: Largest,
    asked: Sequence[list[int]],
    tokens: int,
    round_trips_ms: Sequence[float],
    say: Say,
) -> dict[str, Any]:
    """Seconds per token: as it is, with a round trip for every token, and by the largest member alone."""
    links: dict[str, Any] = {}
    for round_trip_ms in round_trips_ms:
        for share in (1.0, BUSY_SHARE):
            proxy.shape = Shape(delay_s=round_trip_ms / 2e3)
            with Throttle(server.pid, share), Throttle(largest.pid, share):
                rows = [_time(device, largest, prompt, tokens, naive=share == 1) for prompt in asked]
            name = f"{round_trip_ms:g} ms" + ("" if share == 1 else f", server at {share:.0%}")
            seconds = {side: [row[side] for row in rows if side in row] for side in ("family", "naive", "cloud_only")}
            links[name] = {side: statistics.median(values) for side, values in seconds.items() if values}
            for other in ("naive", "cloud_only"):
                pairs = [row[other] / row["family"] for row in rows if other in row]
                if pairs:
                    links[name][f"{other}_over_family"] = statistics.median(pairs)
            say(f"{name}: {links[name]}")
    proxy.shape = Shape()
    ratios = {name: figures.get("naive_over_family") for name, figures in links.items()}
    return {
        "speedup_over_naive_split": {name: ratio for name, ratio in ratios.items() if ratio is not None},
        "speedup_over_cloud_only": {name: figures["cloud_only_over_family"] for name, figures in links.items()},
        "links": links,
        "timed": len(asked),
        "busy_share": BUSY_SHARE,
    }


def _time(device: TextDevice, largest: Largest, prompt: list[int], tokens: int, *, naive: bool) -> dict[str, float]:
    """Seconds per token after the first one."""
    row = {}
    sides: dict[str, int | None] = {"family": None} | ({"naive": 0} if naive else {})
    for side, max_drafts in sides.items():
        _, summary = _generate(device, prompt, tokens, "family", max_drafts)
        row[side] = (summary.seconds - summary.first_token_s) / max(1, summary.count - 1)
    text = largest.decode(prompt, tokens)
    # Its tokens stream: the way adds to the first one alone.
    row["cloud_only"] = text.seconds / max(1, len(text.tokens) - 1)
    return row


def _generate(
    device: TextDevice, prompt: list[int], tokens: int, mode: Mode, max_drafts: int | None = None
) -> tuple[list[int], Any]:
    generation: Generation = device.continue_from(prompt, max_tokens=tokens, mode=mode, max_drafts=max_drafts)
    said = [token.id for token in generation]
    if generation.summary.degraded:
        raise LinkError(f"a text is degraded: {generation.summary.reason}")
    return said, generation.summary


def _first_difference(generated: list[int], reference: list[int], stop_tokens: Sequence[int]) -> int | None:
    """Where two texts part; None where they do not. The reference may end in a stop token."""
    wanted = [token for token in reference if token not in stop_tokens]
    if generated == wanted:
        return None
    pairs = enumerate(zip(generated, wanted, strict=False))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(generated), len(wanted)))
