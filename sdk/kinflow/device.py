"""Device: the one object an app holds.

with kinflow.Device.open("families/fashion/bundle") as device:
    answer = device.infer(image)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from kinflow.answer import Answer, Timings
from kinflow.audit import Audit
from kinflow.auditor import Auditor
from kinflow.backends import Acceleration
from kinflow.codec import Features
from kinflow.confidence import Reading, read
from kinflow.errors import SettingsError
from kinflow.family import Array, Family, Output
from kinflow.forwarder import Forwarder
from kinflow.logs import event
from kinflow.messages import MAX_DEADLINE_MS
from kinflow.offload import Refused, Sent, Times, ask
from kinflow.outbox import Outbox
from kinflow.policy import Keep, NoRoute, Offload, Route, Strain, decide, raise_threshold, rates
from kinflow.preprocess import Preprocessor
from kinflow.settings import DeviceSettings
from kinflow.signing import TrustedKeys
from kinflow.strained import EarlySplits, explained
from kinflow.uplink import Uplink

log = logging.getLogger("kinflow.device")

# The reply must still be turned into an Answer: what is left of the deadline for that.
RESERVE_S = 0.002
SWITCHED_OFF = NoRoute("offloading is switched off", by_choice=True)
NOT_OPEN = NoRoute("the device is not open: use it in a with block")


class Device:
    """Runs the device member and offloads what it is not sure of. Use it with `with`; threads may share it."""

    def __init__(
        self,
        family: Family,
        settings: DeviceSettings | None = None,
        *,
        strain: Callable[[], Strain] | None = None,
    ) -> None:
        """Starts nothing. Raises FamilyMismatch or BackendError when the member cannot run here.

        `strain` is asked at each inference, so it must be quick (kinflow.board.BoardWatch): under strain the
        device keeps fewer answers, and leaves at a split before its exit where the family and a server have one.
        """
        settings = settings or DeviceSettings()
        self.family = family
        self.settings = settings
        self._preprocess = Preprocessor(family.preprocess)
        self._member = family.member(
            settings.member,
            backend=settings.backend,
            threads=settings.threads,
            acceleration=Acceleration(settings.accelerator, settings.engine_cache),
        )
        last = self._member.segments[-1]
        exit_spec = family.manifest.exits[str(last.exit)]
        self._temperature = exit_spec.temperature
        self._threshold = exit_spec.threshold if settings.threshold is None else settings.threshold
        self._uplink: Uplink | None = None
        self._split = last.split if settings.offload else None
        if last.split is None:
            # Nothing above can continue from the last segment: every answer is the family's best.
            self._threshold = 0.0
        else:
            family.codec(last.split, settings.codec)  # raises where it is not there
            self._rates = rates(family.manifest.splits[last.split], settings.codec)
        # Without a split nothing can be offloaded, whatever the strain.
        self._strain = strain if self._split is not None else None
        self._early = EarlySplits(family, self._member, settings.codec)
        self._whole_s: float | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._outbox: Outbox | None = None
        self._forwarder: Forwarder | None = None
        self._auditor: Auditor | None = None
        self._certificate = exit_spec.certificate
        if settings.audit_share and (exit_spec.certificate is None or self._split is None):
            raise SettingsError(
                f"audit_share is {settings.audit_share}: there must be a certificate to audit, and a server to ask"
            )

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        settings: DeviceSettings | None = None,
        *,
        strain: Callable[[], Strain] | None = None,
    ) -> Device:
        """From a bundle's folder or .zip. Raises BundleError, FamilyMismatch or BackendError."""
        settings = settings or DeviceSettings()
        return cls(load_family(bundle, settings), settings, strain=strain)

    def __enter__(self) -> Device:
        if self._pool is not None:
            raise SettingsError("this device is open already: make another one, or leave the with block first")
        self._pool = ThreadPoolExecutor(self.settings.workers, thread_name_prefix="kinflow-submit")
        if self._split is not None:
            self._uplink = Uplink.of_device(self.family, self.settings)
            self._uplink.start()
            if self.settings.outbox:
                self._outbox = Outbox(self.settings.outbox, self.settings.outbox_size)
                self._forwarder = Forwarder(self.family, self._outbox, self._uplink)
                self._forwarder.start()
            if self.settings.audit_share and self._certificate is not None:
                self._auditor = Auditor(
                    self.family,
                    self._certificate,
                    self._split,
                    self._rates,
                    self._uplink,
                    self.settings.audit_share,
                    self._tighten,
                )
                self._auditor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._auditor is not None:
            self._auditor.close()
            self._auditor = None
        if self._forwarder is not None and self._outbox is not None:
            self._forwarder.close()
            self._outbox.close()
            self._forwarder = self._outbox = None
        if self._uplink is not None:
            self._uplink.close()
            self._uplink = None

    def wait_for_server(self, timeout_s: float) -> bool:
        """True as soon as a server can be asked. An app need not wait: until then answers are local."""
        if self._uplink is None or self._split is None:
            return False
        return self._uplink.wait(self._split, self._rates, timeout_s)

    @property
    def audit(self) -> Audit | None:
        """How the certificate stands since it was last refuted; None without `audit_share`."""
        return None if self._auditor is None else self._auditor.audit

    @property
    def threshold(self) -> float:
        """What the exit keeps at: the certificate's or the settings' one, higher once an audit refuted it."""
        return self._threshold

    def _tighten(self) -> float:
        """Half of the way to keeping nothing but certainties."""
        self._threshold += (1.0 - self._threshold) / 2
        return self._threshold

    def infer(self, image: Any, *, deadline_s: float | None = None) -> Answer:
        """One answer, before the deadline.

        `image`: uint8 0…255 or float32 0…1 in the family's size (Preprocessor). `deadline_s`: seconds from
        now; without it the settings' one. Raises InputError for a bad image and BackendError when the device's
        own graph fails; trouble above the device never raises, it makes a degraded answer with a reason.
        """
        return self._infer(image, deadline_s)[0]

    def _infer(self, image: Any, deadline_s: float | None) -> tuple[Answer, Output | None]:
        """The answer, and what the device's exit computed for it; None where features left before it."""
        start = time.perf_counter()
        if deadline_s is None:
            deadline_s = self.settings.deadline_s
        elif not 0 < deadline_s <= MAX_DEADLINE_MS / 1e3:
            raise SettingsError(f"deadline_s must be above 0 and at most an hour, got {deadline_s!r}")
        batch = self._preprocess(image)
        strain = None if self._strain is None else self._strain()
        answer, output = self._compute(batch, strain, start, start + deadline_s - RESERVE_S)
        if log.isEnabledFor(logging.INFO):
            event(
                log,
                logging.INFO,
                "answered",
                id=answer.request_id,
                tier=answer.tier,
                degraded=answer.degraded,
                reason=answer.reason,
                bytes_up=answer.bytes_up,
                ms=round(answer.total_ms, 2),
            )
        return answer, output

    def _compute(self, batch: Array, strain: Strain | None, start: float, due: float) -> tuple[Answer, Output | None]:
        """Up to an early split and no further, or to the exit and what the policy makes of its reading."""
        request_id = os.urandom(16)
        refused: Refused | None = None
        early = self._leaves_early(strain, due - time.perf_counter())
        if early is None:
            began = time.perf_counter()
            output = self._member.run(batch)
            self._whole_s = time.perf_counter() - began
        else:
            features = self._member.start(batch, early.route.split)
            # Should nobody answer, the rest is still to be computed before the deadline.
            times = Times(start, time.perf_counter(), due - (self._whole_s or 0.0))
            asked = self._offloaded(early, features, request_id, times)
            if isinstance(asked, Answer):
                return asked, None
            refused = asked
            output = self._member.finish(features, early.route.split)
        reading = read(output.logits[0], self._temperature)
        local = _Local(start, time.perf_counter(), output, reading, request_id)
        threshold = self._threshold if strain is None else raise_threshold(self._threshold, strain)
        answer = self._decided(local, threshold, due) if refused is None else self._after_refusal(local, refused)
        asked_for_strain = refused is not None or reading.confidence < threshold
        if strain is not None and asked_for_strain and reading.confidence >= self._threshold:
            answer = explained(answer, strain)
        return answer, output

    def _leaves_early(self, strain: Strain | None, remaining_s: float) -> Offload | None:
        """Not at the first frame: how long the whole takes must be known, to have an answer if no server has one."""
        if strain is None or self._uplink is None or self._whole_s is None:
            return None
        return self._early.choose(strain, self._uplink, remaining_s - self._whole_s)

    def _decided(self, local: _Local, threshold: float, due: float) -> Answer:
        """Kept or offloaded, as the policy says."""
        confidence, features = local.reading.confidence, local.output.features
        # Nobody is asked where the exit is sure: looking for a route would cost more than the decision.
        routes = SWITCHED_OFF if confidence >= threshold else self._routes()
        decision = decide(confidence, threshold, routes, due - local.computed)
        if self._auditor is not None:
            kept = isinstance(decision, Keep) and confidence >= self._threshold
            self._auditor.saw(None if features is None else features[0], local.reading, kept)
        if isinstance(decision, Keep):
            return self._local_answer(local, decision)
        assert features is not None  # without them there is no route
        asked = self._offloaded(decision, features, local.request_id, Times(local.start, local.computed, due))
        return asked if isinstance(asked, Answer) else self._after_refusal(local, asked)

    def _offloaded(self, chosen: Offload, features: Features, request_id: bytes, times: Times) -> Answer | Refused:
        assert self._uplink is not None  # without it there is no route
        return ask(self._uplink, self.family, chosen, features, request_id, times)

    def _after_refusal(self, local: _Local, refused: Refused) -> Answer:
        """Whatever went wrong above, the device's own answer is there."""
        return self._local_answer(local, Keep(refused.reason, degraded=True), refused.sent)

    def submit(
        self, image: Any, *, deadline_s: float | None = None, when: Literal["now", "eventually"] = "now"
    ) -> Future[Answer]:
        """`infer` on a thread of the device's pool; `asyncio.wrap_future` makes it awaitable.

        `when="eventually"`: where a server is wanted and none answers, the coded features wait in the settings'
        `outbox`, on the disk, until one does; the future ends then. After a restart `collect` has the answer.
        """
        if self._pool is None:
            raise SettingsError("the device is not open: use it in a with block")
        if when == "now":
            return self._pool.submit(self.infer, image, deadline_s=deadline_s)
        if self._forwarder is None:
            raise SettingsError("submit(when='eventually') needs a file named by `outbox` in the settings, and offload")
        future: Future[Answer] = Future()
        self._pool.submit(self._eventually, self._forwarder, image, deadline_s, future)
        return future

    def collect(self) -> Iterator[Answer]:
        """Answers of inputs that an earlier process submitted with `when="eventually"`; each is handed out once.

        One is forgotten when the next is asked for: if the app dies in between it comes again, with the same
        `request_id`.
        """
        return iter(()) if self._forwarder is None else self._forwarder.collect()

    def _eventually(self, forwarder: Forwarder, image: Any, deadline_s: float | None, future: Future[Answer]) -> None:
        try:
            answer, output = self._infer(image, deadline_s)
            if answer.degraded and answer.tier == "device" and output is not None and output.features is not None:
                forwarder.keep(answer, str(self._split), self._rates[0].codec, output.features[0], future)
            else:
                future.set_result(answer)
        except Exception as exc:
            future.set_exception(exc)

    def _routes(self) -> Sequence[Route] | NoRoute:
        if self._split is None:
            return SWITCHED_OFF
        return NOT_OPEN if self._uplink is None else self._uplink.routes(self._split, self._rates)

    def _local_answer(self, local: _Local, keep: Keep, sent: Sent | None = None) -> Answer:
        return Answer(
            label=self.family.labels[local.reading.label],
            index=local.reading.label,
            confidence=local.reading.confidence,
            tier="device",
            exit=local.output.exit,
            degraded=keep.degraded,
            reason=keep.reason,
            bytes_up=0 if sent is None else sent.bytes_up,
            bytes_down=0,
            total_ms=(time.perf_counter() - local.start) * 1e3,
            timings=Timings(
                (local.computed - local.start) * 1e3,
                0.0 if sent is None else sent.encode_ms,
                0.0 if sent is None else (time.perf_counter() - sent.at) * 1e3,
            ),
            request_id=local.request_id.hex(),
            codec="" if sent is None else sent.codec,
        )


def load_family(bundle: str | Path, settings: DeviceSettings) -> Family:
    """What the device in `settings` needs of a bundle, signed as they want it. Raises BundleError, SettingsError."""
    trusted = TrustedKeys.parse(settings.trusted_keys)
    return Family.load(bundle, trusted=trusted, member=settings.member, backend=settings.backend)


class _Local(NamedTuple):
    """What the device itself found out about one image."""

    start: float
    computed: float
    output: Output
    reading: Reading
    request_id: bytes
