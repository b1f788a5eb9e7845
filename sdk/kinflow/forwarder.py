"""Sends what waits in the outbox as soon as a server can be asked, oldest first, and keeps the answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from msgspec.structs import replace

from kinflow.answer import Answer
from kinflow.codec import Features
from kinflow.errors import CodecError, KinflowError, LinkError, OutboxError, ServerFailed
from kinflow.family import Family
from kinflow.logs import event
from kinflow.outbox import Entry, Outbox
from kinflow.policy import NoRoute, Offload, Rate
from kinflow.uplink import Uplink

log = logging.getLogger("kinflow.forwarder")

# Nobody waits for these: a slow server gets the time it needs.
TIMEOUT_S = 30.0
# How often to look whether there is a server.
LOOK_S = 0.5
BATCH = 32
WAITED = "it waited for a server"
"""The reason in such an answer."""


class Forwarder:
    """One thread between an outbox and an uplink. Closing it loses nothing."""

    def __init__(
        self,
        family: Family,
        outbox: Outbox,
        uplink: Uplink,
    ) -> None:
        self._family = family
        self._outbox = outbox
        self._uplink = uplink
        self._futures: dict[bytes, Future[Answer]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kinflow-forwarder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Futures that still wait are cancelled; their entries stay in the outbox."""
        self._stop.set()
        self._wake.set()
        self._thread.join()
        for future in self._futures.values():
            future.cancel()

    def keep(self, own: Answer, split: str, codec: str, features: Features, future: Future[Answer]) -> None:
        """Queue them. `future` ends with a server's answer, unless this process ends before.

        Where they cannot be kept it ends with `own`, the device's answer.
        """
        id_ = bytes.fromhex(own.request_id)
        with self._lock:
            self._futures[id_] = future
        try:
            payload = self._family.codec(split, codec).encode(features)
            self._outbox.put(Entry(id_, self._family.id, self._family.version, split, codec, payload, own))
        except (CodecError, OutboxError) as exc:
            with self._lock:
                del self._futures[id_]
            future.set_result(replace(own, reason=f"{own.reason}; {exc.code}: {exc}"))
            return
        self._wake.set()

    def collect(self) -> Iterator[Answer]:
        """Answers that no future waits for: of inputs that an earlier process submitted.

        Each is gone when the next one is asked for: an app that dies in between gets it again, with the same
        request_id.
        """
        for id_, answer in self._outbox.answers():
            with self._lock:
                waited_for = id_ in self._futures
            if not waited_for:
                yield answer
                self._outbox.remove(id_)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._send_all()
            except KinflowError as exc:
                event(log, logging.WARNING, "forwarding failed", error=str(exc))
            self._wake.wait(LOOK_S)

    def _send_all(self) -> None:
        """Oldest first, until the queue is empty or nobody answers."""
        row = 0
        while not self._stop.is_set():
            found = self._outbox.queued(row, BATCH)
            if not found:
                return
            for _, entry in found:
                if not self._send(entry):
                    return
            row = found[-1][0]

    def _send(self, entry: Entry) -> bool:
        """Whether to go on with the next one."""
        if (entry.family, entry.version) != (self._family.id, self._family.version):
            here = f"{self._family.id} {self._family.version}"
            reason = f"it waited for a server of {entry.family} {entry.version}, and this is {here} now"
            self._finish(entry, replace(entry.own, degraded=True, reason=reason))
            return True
        routes = self._uplink.routes(entry.split, [Rate(entry.codec, len(entry.payload))])
        if isinstance(routes, NoRoute):
            return False
        chosen = Offload(routes[0], entry.codec, WAITED)
        try:
            answer = self._ask(entry, chosen)
        except ServerFailed as exc:  # it would fail again: what waits behind it must not wait for ever
            self._finish(entry, replace(entry.own, degraded=True, reason=str(exc)))
            return True
        except LinkError as exc:
            event(log, logging.INFO, "not forwarded yet", id=entry.id.hex(), error=str(exc))
            return False
        self._finish(entry, answer)
        return True

    def _ask(self, entry: Entry, chosen: Offload) -> Answer:
        """A server's answer. Raises LinkError."""
        labels = self._family.labels
        resort = self._uplink.request(chosen, entry.id, entry.payload, TIMEOUT_S)
        try:
            answered = resort.answer(TIMEOUT_S, len(labels))
        except LinkError:
            resort.abandon()
            raise
        reply = answered.reply
        return replace(
            entry.own,
            label=labels[reply.label],
            index=reply.label,
            confidence=reply.confidence,
            tier=reply.tier,
            exit=reply.exit,
            degraded=reply.degraded,
            reason=reply.reason if reply.degraded else chosen.reason,
            bytes_up=answered.bytes_up,
            bytes_down=answered.bytes_down,
            timings=replace(entry.own.timings, link_ms=answered.round_trip_s * 1e3, hops=tuple(reply.hops)),
            codec=entry.codec,
        )

    def _finish(self, entry: Entry, answer: Answer) -> None:
        self._outbox.answered(entry.id, answer)
        with self._lock:
            future = self._futures.get(entry.id)
        if future is not None:
            if future.set_running_or_notify_cancel():
                future.set_result(answer)
            self._outbox.remove(entry.id)
            with self._lock:  # last: until then `collect` leaves it to the future
                del self._futures[entry.id]
