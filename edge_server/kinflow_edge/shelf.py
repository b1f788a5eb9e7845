"""Hands out the files of the bundles that this server serves, in parts: `kinflow pull` asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from kinflow import topics
from kinflow.bundle import MANIFEST
from kinflow.errors import BundleError, FamilyMismatch, FrameError, KinflowError, LinkError
from kinflow.family import Family
from kinflow.frame import Buffer, pack, unpack
from kinflow.logs import event
from kinflow.messages import Busy, Failure, Fetch, Part
from kinflow.signing import SIGNATURE
from kinflow_edge.allowance import Allowance

log = logging.getLogger("kinflow.shelf")


class Shelf:
    """Answers Fetch messages. It reads from memory: it never waits, and runs on the network thread."""

    def __init__(
        self,
        node: str,
        families: Mapping[str, Family],
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
        except KinflowError as exc:
            return pack(Failure(fetch.id, self._node, exc.code, str(exc)[:512]))
        part = contents[fetch.offset : fetch.offset + fetch.length]
        wait_s = self._allowance.take(fetch.client, len(part), time.monotonic())
        if wait_s > 0:
            return pack(Busy(fetch.id, self._node, wait_s * 1e3))
        return pack(Part(fetch.id, self._node, len(contents)), part)

    def _find(self, fetch: Fetch) -> bytes:
        files = self._files.get(fetch.family)
        if files is None:
            raise FamilyMismatch(f"family {fetch.family!r} is not served here, {sorted(self._files)} are")
        if fetch.path not in files:
            raise BundleError(f"{fetch.family} has no file {fetch.path!r}")
        return files[fetch.path]


def _contents(family: Family) -> dict[str, bytes]:
    return {**family.files, MANIFEST: family.raw_manifest, SIGNATURE: family.signatures}
