"""A small client of text servers for tests: drafts with a bundle's own graphs, and decodes plainly to compare with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinflow.bundle import MANIFEST
from kinflow.messages import Verdict, Verify
from kinflow.settings import DeviceSettings
from kinflow.text.device import TextDevice
from kinflow.text.family import TextFamily
from kinflow.text.manifest import IDS
from kinflow.text.sampling import GREEDY, Sampling, choose

Ask = Callable[[Verify, bytes], Verdict]


def copy_tiny(tiny: Path, folder: Path, **changes: Any) -> Path:
    """The tiny bundle with another manifest."""
    shutil.copytree(tiny, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return folder


class Chain:
    """Some segments in a row with caches of their own; features are coded where a codec is named for their split."""

    def __init__(self, family: TextFamily, *path: str, codecs: dict[str, str] | None = None, device: str = "int8"):
        self.family = family
        self.codecs = codecs or {}
        precisions = {"lower": device, "branch-device": device}
        self.segments = [family.segment(name, precisions.get(name, "float")) for name in path]
        self.caches = {segment.name: segment.past() for segment in self.segments}
        self.coded: dict[str, bytes] = {}

    def feed(self, inputs: np.ndarray) -> np.ndarray:
        """[n] ids or [n, width] features -> [n, width]."""
        at: Any = inputs[None]
        for segment in self.segments:
            at = segment.run(at, [self.caches[segment.name]])
            split = self.family.manifest.segments[segment.name].result
            if split in self.codecs:
                codec = self.family.codec(split, self.codecs[split])
                self.coded[split] = codec.encode(at[0])
                at = codec.decode(self.coded[split], at.shape[1])[None]
        return np.asarray(at[0])

    def crop(self, length: int) -> None:
        for cache in self.caches.values():
            cache.crop(length)


def plain(
    family: TextFamily,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling = GREEDY,
    *,
    known: Sequence[int] = (),
    exit: str = "cloud",
    codecs: dict[str, str] | None = None,
    device: str = "int8",
) -> list[int]:
    """One token at a time through all layers up to an exit: what verified decoding must give too.

    `known`: tokens that follow the prompt already. Computed at once they would round otherwise, and a tie may turn.
    """
    chain = Chain(family, *family.manifest.exits[exit].segments, codecs=codecs, device=device)
    head = family.head()
    tokens = [*prompt, *known]
    normed = chain.feed(np.array(prompt))
    for token in known:
        normed = chain.feed(np.array([token]))
    while len(tokens) < len(prompt) + len(known) + count:
        logits = head.run(normed[-1:])[0]
        tokens.append(choose(logits, sampling, len(tokens)).token)
        normed = chain.feed(np.array(tokens[-1:]))
    return tokens[len(prompt) + len(known) :]


def text_of(tiny: Path, prompt: str, broker: str = "", **options: Any) -> str:
    """What the SDK generates; alone without a broker."""
    with TextDevice.open(tiny, DeviceSettings(broker=broker, offload=bool(broker))) as device:
        assert not broker or device.wait_for_server(20)
        return "".join(token.text for token in device.generate(prompt, **options))


@dataclass
class Writer:
    """One generation: drafts, sends, takes verdicts. `ask` gets a request to its verdict."""

    family: TextFamily
    client: str
    ask: Ask
    split: str = "s1"
    codec: str = "int8"
    exact: bool = False
    sampling: Sampling = GREEDY
    drafts: int = 3
    exit: str = "cloud"
    deadline_ms: float = 20_000.0
    session: bytes = field(default_factory=lambda: os.urandom(16))
    tokens: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Exact texts take the float graph; there a position's features do not depend on their neighbours'.
        device = "float" if self.exact else "int8"
        codecs = {} if self.split == IDS else {"s1": self.codec}
        self._lower = Chain(self.family, "lower", codecs=codecs, device=device)
        self._branch = Chain(self.family, "branch-device", device=device)
        self._head = self.family.head("int8")
        self._coded: list[bytes] = []
        self._normed: np.ndarray = np.zeros((0, self.family.manifest.width), np.float32)

    def begin(self, prompt: Sequence[int]) -> Verdict:
        """Open the session and get the first token."""
        self._add(list(prompt))
        return self._send(0, len(prompt))

    def step(self) -> Verdict:
        """One round: the last token, a few drafts."""
        start = len(self._coded)
        self._add(self.tokens[start:])
        confirmed = len(self.tokens)
        for _ in range(self.drafts):
            logits = self._head.run(self._normed[-1:])[0]
            self._add([choose(logits, self.sampling, len(self.tokens)).token], new=True)
        return self._send(start, confirmed)

    def write(self, prompt: Sequence[int], count: int) -> list[int]:
        """`count` tokens, or a few more."""
        if not self.tokens:
            self.begin(prompt)
        while len(self.tokens) < len(prompt) + count:
            self.step()
        return self.tokens[len(prompt) : len(prompt) + count]

    def request(self, start: int, confirmed: int, **changes: Any) -> tuple[Verify, bytes]:
        """All positions from `start` on, as far as they are computed."""
        fields = {
            "id": os.urandom(16),
            "client": self.client,
            "family": self.family.id,
            "version": self.family.version,
            "split": self.split,
            "codec": self.codec,
            "session": self.session,
            "start": start,
            "confirmed": confirmed,
            "count": len(self._coded) - start,
            "exit": self.exit,
            "exact": self.exact,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "deadline_ms": self.deadline_ms,
        }
        features = b"" if self.split == IDS else b"".join(self._coded[start:])
        return Verify(**{**fields, **changes}), np.array(
            self.tokens[start : len(self._coded)], "<u4"
        ).tobytes() + features

    def again(self, start: int = 0) -> Verdict:
        """All that is known, from `start` on: to a server that has less, or to another one."""
        self._add(self.tokens[len(self._coded) :])
        return self._send(start, len(self.tokens))

    def _send(self, start: int, confirmed: int) -> Verdict:
        verdict = self.ask(*self.request(start, confirmed))
        self.take(verdict, confirmed)
        return verdict

    def take(self, verdict: Verdict, confirmed: int) -> None:
        """What stands stays, with the server's own token behind it."""
        self.verdicts.append(verdict)
        held = confirmed + verdict.accepted
        self._lower.crop(held)
        self._branch.crop(held)
        del self._coded[held:]
        self.tokens[held:] = [verdict.token]

    def _add(self, tokens: list[int], *, new: bool = False) -> None:
        """The device computes them; the prompt at once, everything else one by one."""
        fresh = new or not self.tokens
        if fresh:
            self.tokens += tokens
        for part in [tokens] if not self._coded else [[token] for token in tokens]:
            features = self._lower.feed(np.array(part))
            coded = self._lower.coded.get("s1", b"")
            size = len(coded) // len(part)
            self._coded += [coded[at * size : (at + 1) * size] for at in range(len(part))]
            self._normed = self._branch.feed(features)
