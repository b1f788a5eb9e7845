"""The worker that edge and cloud servers share: admits requests, batches, computes, answers or escalates.

The network thread unpacks, decodes and admits; one thread of the worker's own runs the graphs and answers.
What it needs of the outside comes in as `publish`, `drive` (Connection's) and `uplinks`: it owns no socket.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from kinflow import frame, topics
from kinflow.codec import Features
from kinflow.confidence import read
from kinflow.errors import BackendError, FamilyMismatch, FrameError, KinflowError, LinkError
from kinflow.link import Answered
from kinflow.logs import event
from kinflow.messages import Busy, Cancel, Echo, Failure, Probe, Reply, Request, Served, Tier
from kinflow.policy import Keep, NoRoute, Offload, Route, decide
from kinflow.resort import Resort
from kinflow.settings import ServerSettings
from kinflow.uplink import Uplink
from kinflow_edge.batcher import Batcher
from kinflow_edge.job import Computed, Job
from kinflow_edge.model import ServedFamily
from kinflow_edge.recent import RecentRequests

log = logging.getLogger("kinflow.worker")

# The reply still has to travel back: a server asks upstream for that much less than what is left.
REPLY_RESERVE_S = 0.005
# How long an idle worker reads before it looks around.
IDLE_S = 0.5
NOTHING_ABOVE = NoRoute("no upstream is set", by_choice=True)


class Worker:
    """Serves `models` (by family id) for one node."""

    def __init__(
        self,
        node: str,
        tier: Tier,
        models: Mapping[str, ServedFamily],
        settings: ServerSettings,
        *,
        publish: Callable[[str, bytes], None],
        drive: Callable[[Callable[[], bool], float], None],
        uplinks: Mapping[str, Uplink],
        test_client: str = "",
    ) -> None:
        """`test_client`: whose requests are the server's own test: computed and answered here, and not counted."""
        self._node = node
        self._tier = tier
        self._models = dict(models)
        self._publish = publish
        self._drive = drive
        self._uplinks = dict(uplinks)
        self._test_client = test_client
        self._batcher: Batcher[Job] = Batcher(
            size=settings.batch_size,
            wait_s=settings.batch_wait_ms / 1e3,
            capacity=settings.queue_size,
            per_client=settings.queue_size_per_device,
        )
        self._recent = RecentRequests()
        self._escalated: dict[tuple[str, bytes], Resort] = {}
        """What the tier above was asked, by the client and the id of the request here."""
        self.counts: Counter[str] = Counter()
        """Since the start: served, escalated, busy, repeated, cancelled, expired, lost, and failed:<code>."""
        self.batches: Counter[int] = Counter()
        """How often each batch size was computed."""
        self.busy_s = 0.0
        """Seconds spent on batches since the start."""
        self.last_request_s: float | None = None
        """When a request came last (time.monotonic()), the server's own tests aside."""
        self._thread = threading.Thread(target=self._run, name="kinflow-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finish what was admitted, then end."""
        self._batcher.close()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def families(self) -> list[Served]:
        return [model.served() for model in self._models.values()]

    @property
    def queue_s(self) -> float:
        return self._batcher.queue_s()

    @property
    def under_way(self) -> int:
        """Requests that were admitted and have no answer yet."""
        return self._batcher.waiting + len(self._escalated)

    @property
    def rejected(self) -> int:
        return self.counts["busy"] + sum(n for name, n in self.counts.items() if name.startswith("failed:"))

    def on_message(self, topic: str, data: frame.Buffer) -> None:
        """Runs on the network thread: never computes, never raises."""
        arrived_s = time.monotonic()
        try:
            message, payload = frame.unpack(data)
            if not isinstance(message, (Request, Cancel, Probe)):
                raise FrameError(f"a {type(message).__name__} came on {topic}, requests are expected there")
            # The broker's access list sees to the topic alone: a reply goes only to whom the topic names.
            if topics.client_of(topic) != message.client:
                raise FrameError(f"a request of {message.client} came on {topic}: not its own topic")
        except FrameError as exc:
            # Nobody to answer: the id and the reply topic are in what could not be read.
            self.counts[f"failed:{exc.code}"] += 1
            event(log, logging.WARNING, "refused", code=exc.code, topic=topic, error=str(exc))
            return
        if isinstance(message, Probe):
            echo = Echo(message.id, self._node, self._batcher.queue_s(message.client) * 1e3)
            self._send(message, frame.pack(echo))
            return
        if isinstance(message, Cancel):
            self._cancel(message)
            return
        try:
            self._admit(message, payload, arrived_s)
        except KinflowError as exc:
            self._fail(message, exc)
        except Exception as exc:  # the server outlives whatever one request brings
            log.exception("internal error id=%s", message.id.hex())
            self._fail(message, KinflowError(f"{type(exc).__name__}: {exc}"))

    def _cancel(self, cancel: Cancel) -> None:
        """Only its own client's request, and only while nothing was sent: what is in the graph is finished."""
        waiting = self._batcher.remove(cancel.client, lambda job: job.request.id == cancel.id)
        resort = self._escalated.pop((cancel.client, cancel.id), None)
        if resort is not None:
            resort.abandon()
            waiting = True
        if waiting:
            self.counts["cancelled"] += 1
            self._recent.forget(cancel.client, cancel.id)

    def _admit(self, request: Request, payload: frame.Buffer, arrived_s: float) -> None:
        if request.client != self._test_client:
            self.last_request_s = arrived_s
        new, reply = self._recent.begin(request.client, request.id)
        if not new:
            self.counts["repeated"] += 1
            if reply is not None:
                self._send(request, reply)
            return
        model = self._models.get(request.family)
        if model is None:
            raise FamilyMismatch(f"family {request.family!r} is not served here, {sorted(self._models)} are")
        entry, codec = model.entry(request)
        queue_s = self._batcher.queue_s(request.client)
        budget_s = request.deadline_ms / 1e3 - REPLY_RESERVE_S
        if queue_s > budget_s:
            self._refuse_busy(request, queue_s)
            return
        features = codec.decode(payload)
        kept = bytes(payload) if model.forwards else b""
        job = Job(request, model, entry, features, kept, arrived_s, time.monotonic(), arrived_s + budget_s)
        if not self._batcher.put(request.client, job):
            self._refuse_busy(request, queue_s)

    def _refuse_busy(self, request: Request, queue_s: float) -> None:
        self.counts["busy"] += 1
        self._recent.forget(request.client, request.id)
        event(log, logging.INFO, "busy", id=request.id.hex(), queue_ms=round(queue_s * 1e3, 1))
        self._send(request, frame.pack(Busy(request.id, self._node, queue_s * 1e3)))

    def _run(self) -> None:
        while batch := self._next_batch():
            start_s = time.monotonic()
            groups: dict[int, list[Job]] = {}
            for job in batch:
                if job.due_s < start_s:
                    self.counts["expired"] += 1
                    event(log, logging.INFO, "expired", id=job.request.id.hex())
                else:
                    groups.setdefault(id(job.entry), []).append(job)
            for jobs in groups.values():
                self._compute(jobs)
            spent_s = time.monotonic() - start_s
            self.busy_s += spent_s
            self._batcher.done(len(batch), spent_s)

    def _next_batch(self) -> list[Job]:
        """Idle, this thread reads the socket itself: a request is then computed without a switch of threads."""
        while not self._batcher.ready():
            until_s = time.monotonic() + IDLE_S
            self._drive(self._batcher.ready, until_s)
            if self._batcher.wait(until_s):
                break
        return self._batcher.take()

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Run one entry for all jobs, then answer or escalate each."""
        model, entry = jobs[0].model, jobs[0].entry
        start_s = time.monotonic()
        try:
            output = entry.member.run(np.stack([job.features for job in jobs]))
        except BackendError as exc:
            for job in jobs:
                self._fail(job.request, exc)
            return
        compute_ms = (time.monotonic() - start_s) * 1e3
        self.batches[len(jobs)] += 1
        for position, job in enumerate(jobs):
            reading = read(output.logits[position], model.exit.temperature)
            mine = Computed(job, reading, output.exit, (start_s - job.admitted_s) * 1e3, compute_ms)
            try:
                self._settle(mine, None if output.features is None else output.features[position])
            except Exception as exc:  # one request must not take the others of its batch with it
                log.exception("internal error id=%s", job.request.id.hex())
                self._fail(job.request, KinflowError(f"{type(exc).__name__}: {exc}"))

    def _settle(self, mine: Computed, features: Features | None) -> None:
        """Answer with this exit, or send the features further up."""
        model = mine.job.model
        if model.next_split is None:
            self._reply(mine, Keep("last exit", degraded=False))
            return
        uplink = self._uplinks.get(model.family.id)
        confidence, threshold = mine.reading.confidence, model.exit.threshold
        test = mine.job.request.client == self._test_client
        if uplink is None or confidence >= threshold or test or not model.leads_up(mine.job.request.split):
            routes: Sequence[Route] | NoRoute = NOTHING_ABOVE
        else:
            routes = uplink.routes(model.next_split, model.rates_up(mine.job.request.codec, len(mine.job.payload)))
        decision = decide(confidence, threshold, routes, mine.job.due_s - time.monotonic())
        if isinstance(decision, Offload) and uplink is not None:
            self._escalate(mine, uplink, decision, features)
        elif isinstance(decision, Keep):
            self._reply(mine, decision)

    def _escalate(self, mine: Computed, uplink: Uplink, decision: Offload, features: Features | None) -> None:
        request = mine.job.request
        payload = mine.job.payload
        if features is not None:
            payload = mine.job.model.family.codec(decision.route.split, decision.codec).encode(features)
        resort = uplink.request(decision, request.id, payload, mine.job.due_s - time.monotonic())
        self.counts["escalated"] += 1
        self._escalated[request.client, request.id] = resort
        resort.add_done_callback(partial(self._relay, mine))
        resort.watch()

    def _relay(self, mine: Computed, done: Future[Answered[Reply]]) -> None:
        """The tier above answered, or did not: runs on the upstream link's thread."""
        request = mine.job.request
        if self._escalated.pop((request.client, request.id), None) is None:
            return  # cancelled
        try:
            answered = done.result()
        except LinkError as exc:
            self._reply(mine, Keep(f"{exc.code}: {exc}", degraded=True))
            return
        above = answered.reply
        hops = [mine.hop(self._node, self._tier, answered.bytes_up), *above.hops]
        self._answer(
            mine.job,
            Reply(
                id=mine.job.request.id,
                label=above.label,
                confidence=above.confidence,
                tier=above.tier,
                exit=above.exit,
                degraded=above.degraded,
                reason=above.reason,
                hops=hops,
            ),
        )

    def _reply(self, mine: Computed, keep: Keep) -> None:
        self._answer(
            mine.job,
            Reply(
                id=mine.job.request.id,
                label=mine.reading.label,
                confidence=min(1.0, mine.reading.confidence),
                tier=self._tier,
                exit=mine.exit,
                degraded=keep.degraded,
                reason=keep.reason[:512],
                hops=[mine.hop(self._node, self._tier, 0)],
            ),
        )

    def _answer(self, job: Job, reply: Reply) -> None:
        if job.request.client != self._test_client:
            self.counts["served"] += 1
        data = frame.pack(reply)
        self._recent.finish(job.request.client, reply.id, data)
        if log.isEnabledFor(logging.INFO):
            spent_ms = round((time.monotonic() - job.arrived_s) * 1e3, 2)
            event(
                log,
                logging.INFO,
                "answered",
                id=reply.id.hex(),
                exit=reply.exit,
                tier=reply.tier,
                ms=spent_ms,
            )
        self._send(job.request, data)

    def _fail(self, request: Request, error: KinflowError) -> None:
        self.counts[f"failed:{error.code}"] += 1
        event(log, logging.WARNING, "refused", id=request.id.hex(), code=error.code, error=str(error))
        data = frame.pack(Failure(request.id, self._node, error.code, str(error)[:512]))
        self._recent.finish(request.client, request.id, data)
        self._send(request, data)

    def _send(self, request: Request | Probe, data: bytes) -> None:
        """A reply that cannot be sent is lost: the device's deadline takes care of it."""
        try:
            self._publish(topics.reply(request.client), data)
        except LinkError as exc:
            self.counts["lost"] += 1
            event(log, logging.WARNING, "lost", id=request.id.hex(), error=str(exc))
