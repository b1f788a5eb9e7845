"""Hands out the files of the bundles that this server serves, in parts: `kinflow pull` asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kinflow import topics
from kinflow.bundle import MANIFEST, safe_path
from kinflow.errors import BundleError, FamilyMismatch, FrameError, KinflowError, LinkError
from kinflow.family import Family
from kinflow.frame import Buffer, pack, unpack
from kinflow.logs import event
from kinflow.messages import Busy, Failure, Fetch, Part
from kinflow.signing import SIGNATURE
from kinflow.text.family import TextFamily
from kinflow_edge.allowance import Allowance

log = logging.getLogger("kinflow.shelf")


class Shelf:
    """Answers Fetch messages, on the network thread: from memory, or one part at a time from the disk."""

    def __init__(
        self,
        node: str,
        families: Mapping[str, Family | TextFamily],
        publish: Callable[[str, bytes], None],
        bytes_per_s: float,
    ) -> None:
        """`bytes_per_s`: what one client may take."""
        self._node = node
        self._files = {name: _contents(family) for name, family in families.items()}
        self._publish = publish
        self._allowance = Allowance(bytes_per_s)

    def on_message(self, topic: str, data: Buffer) -> None:
        try:
            message = unpack(data).message
            if not isinstance(message, Fetch) or topics.client_of(topic) != message.client:
                raise FrameError(f"not a client's own fetch on {topic}")
        except FrameError as exc:
            event(log, logging.WARNING, "refused", code=exc.code, topic=topic, error=str(exc))
            return
        try:
            self._publish(topics.reply(message.client), self._answer(message))
        except LinkError as exc:
            event(log, logging.WARNING, "lost", id=message.id.hex(), error=str(exc))

    def _answer(self, fetch: Fetch) -> bytes:
        try:
            contents = self._find(fetch)
            length = max(0, min(fetch.length, len(contents) - fetch.offset))
            wait_s = self._allowance.take(fetch.client, length, time.monotonic())
            if wait_s > 0:
                return pack(Busy(fetch.id, self._node, wait_s * 1e3))
            part = contents[fetch.offset : fetch.offset + length]
        except KinflowError as exc:
            return pack(Failure(fetch.id, self._node, exc.code, str(exc)[:512]))
        return pack(Part(fetch.id, self._node, len(contents)), part)

    def _find(self, fetch: Fetch) -> bytes | OnDisk:
        files = self._files.get(fetch.family)
        if files is None:
            raise FamilyMismatch(f"family {fetch.family!r} is not served here, {sorted(self._files)} are")
        if fetch.path not in files:
            raise BundleError(f"{fetch.family} has no file {fetch.path!r}")
        return files[fetch.path]


class OnDisk:
    """A file too large to keep; whoever pulls it compares its hash."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice) -> bytes:
        """Raises BundleError."""
        start, end, _ = part.indices(self._size_bytes)
        try:
            with self._path.open("rb") as stream:
                stream.seek(start)
                return stream.read(end - start)
        except OSError as exc:
            raise BundleError(f"{self._path}: {exc.strerror}") from exc


def _contents(family: Family | TextFamily) -> Mapping[str, bytes | OnDisk]:
    about = {MANIFEST: family.raw_manifest, SIGNATURE: family.signatures}
    if isinstance(family, Family):
        return {**family.files, **about}
    files = family.manifest.files()
    if not family.path.is_dir():
        return about  # a .zip: what it holds is read whole, or not at all
    return {**{file.path: OnDisk(family.path / safe_path("", file.path), file.bytes) for file in files}, **about}
