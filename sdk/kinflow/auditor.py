"""Offloads a random share of the answers that a device kept, when it is idle, and compares.

Each image is drawn with the same chance, whatever its confidence: then the losses are those of all images, as in the
certificate. One that was not kept cannot be a loss and costs nothing. Drawn images that no server answers are left out.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable

from kinflow.audit import Audit, RiskTest
from kinflow.awaited import Answered
from kinflow.codec import Features
from kinflow.confidence import Reading
from kinflow.errors import CodecError, LinkError
from kinflow.family import Family
from kinflow.logs import event
from kinflow.manifest import Certificate
from kinflow.messages import Reply
from kinflow.policy import NoRoute, Offload, Rate
from kinflow.uplink import Uplink

log = logging.getLogger("kinflow.device")

# Idle: nothing was inferred for this long.
IDLE_S = 0.05
TIMEOUT_S = 5.0
# What waits for an idle moment; more is left out. Few, since they hold features.
MAX_WAITING = 8


class Auditor:
    """`start`, tell it of every answer with `saw`, `close`."""

    def __init__(
        self,
        family: Family,
        certificate: Certificate,
        split: str,
        rates: tuple[Rate, ...],
        uplink: Uplink,
        share: float,
        tighten: Callable[[], float],
    ) -> None:
        """`share`: of all images. `tighten` raises the threshold and returns it, when the certificate is refuted."""
        self._family = family
        self._certificate = certificate
        self._split = split
        self._rates = rates
        self._uplink = uplink
        self._share = share
        self._tighten = tighten
        self._refuted = 0
        self._test = self._new_test()
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[Features, Reading] | None] = queue.Queue(MAX_WAITING)
        self._busy_until_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kinflow-audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def audit(self) -> Audit:
        with self._lock:
            return self._test.audit

    @property
    def refuted(self) -> int:
        """How often the certificate was refuted, and the threshold tightened, since the start."""
        return self._refuted

    def saw(self, features: Features | None, reading: Reading, kept: bool) -> None:
        """An image was answered. Quick: what it costs comes later."""
        self._busy_until_s = time.monotonic() + IDLE_S
        if random.random() >= self._share:
            return
        if not kept:
            self._observe(0.0)
        elif features is not None and not self._waiting.full():
            self._waiting.put((features, reading))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                drawn = self._waiting.get(timeout=0.2)
            except queue.Empty:
                continue
            while (left_s := self._busy_until_s - time.monotonic()) > 0 and not self._stop.is_set():
                time.sleep(left_s)
            if drawn is not None and not self._stop.is_set():
                self._compare(*drawn)

    def _compare(self, features: Features, reading: Reading) -> None:
        routes = self._uplink.routes(self._split, self._rates)
        if isinstance(routes, NoRoute):
            return
        offload = Offload(routes[0], routes[0].rates[0].codec, "audit")
        try:
            payload = self._family.codec(self._split, offload.codec).encode(features)
            answered: Answered[Reply] = self._uplink.request(offload, os.urandom(16), payload, TIMEOUT_S).result()
        except (CodecError, LinkError) as exc:
            event(log, logging.DEBUG, "not audited", error=str(exc))
            return
        reply = answered.reply
        if reply.degraded:
            return
        loss = 0.0
        if reply.label != reading.label:
            # Gap: wrong here and right above. The confidence above is the chance of the latter, and if it is right
            # there, it is wrong here.
            loss = reply.confidence if self._certificate.risk == "gap" else 1.0
        self._observe(loss)

    def _observe(self, loss: float) -> None:
        with self._lock:
            self._test.observe(loss)
            audit = self._test.audit
            if audit.holds:
                return
            self._refuted += 1
            self._test = self._new_test()
        threshold = self._tighten()
        event(
            log,
            logging.WARNING,
            "certificate refuted",
            n=audit.n,
            risk=audit.risk,
            at_least=audit.at_least,
            epsilon=audit.epsilon,
            threshold=threshold,
        )

    def _new_test(self) -> RiskTest:
        # Halved each time: all tests of one device together err with probability delta at the most.
        return RiskTest(self._certificate.epsilon, self._certificate.delta / 2 ** (self._refuted + 1))
