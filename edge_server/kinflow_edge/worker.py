"""The worker that edge and cloud servers share: admits requests, batches, computes, answers or escalates.

The network thread unpacks, decodes and admits; one thread of the worker's own runs the graphs and answers.
What it needs of the outside comes in as `publish`, `publish_all`, `drive` (Connection's) and `uplinks`: it owns no
socket.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec
import numpy as np

from kinflow import frame, topics
from kinflow.awaited import Answered
from kinflow.codec import Features
from kinflow.confidence import read
from kinflow.errors import BackendError, FamilyMismatch, LinkError
from kinflow.messages import Cancel, Probe, Reply, Request, Served, Tier
from kinflow.policy import Decision, Keep, NoRoute, Offload, Route, decide
from kinflow.resort import Resort
from kinflow.settings import ServerSettings
from kinflow.uplink import Uplink
from kinflow_edge.batcher import Batcher
from kinflow_edge.desk import REPLY_RESERVE_S, Desk
from kinflow_edge.job import Computed, Job
from kinflow_edge.model import ServedFamily

# How long an idle worker reads before it looks around.
IDLE_S = 0.5
NOTHING_ABOVE = NoRoute("no upstream is set", by_choice=True)
LAST_EXIT = Keep("last exit", degraded=False)


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
        publish_all: Callable[[Sequence[tuple[str, bytes]]], None],
        drive: Callable[[Callable[[], bool], float], None],
        uplinks: Mapping[str, Uplink],
        test_client: str = "",
    ) -> None:
        """`test_client`: whose requests are the server's own test: computed and answered here, and not counted."""
        self.desk = Desk(node, publish, settings.requests_per_s_per_device, test_client)
        self._node = node
        self._tier = tier
        self._models = dict(models)
        self._publish_all = publish_all
        self._drive = drive
        self._uplinks = dict(uplinks)
        self._batcher: Batcher[Job] = Batcher(
            size=settings.batch_size,
            wait_s=settings.batch_wait_ms / 1e3,
            capacity=settings.queue_size,
            per_client=settings.queue_size_per_device,
        )
        self._escalated: dict[tuple[str, bytes], Resort] = {}
        """What the tier above was asked, by the client and the id of the request here."""
        self.batches: Counter[int] = Counter()
        """How often each batch size was computed."""
        self.busy_s = 0.0
        """Seconds spent on batches since the start."""
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

    def on_message(self, topic: str, data: frame.Buffer) -> None:
        """Runs on the network thread: never computes, never raises."""
        arrived_s = time.monotonic()
        found = self.desk.read(topic, data, (Request, Cancel, Probe))
        if found is None:
            return
        message, payload = found
        if isinstance(message, Probe):
            self.desk.echo(message, self._batcher.queue_s(message.client))
        elif isinstance(message, Cancel):
            self._cancel(message)
        elif isinstance(message, Request):
            self.desk.guarded(message, partial(self._admit, message, payload, arrived_s))

    def _cancel(self, cancel: Cancel) -> None:
        """Only its own client's request, and only while nothing was sent: what is in the graph is finished."""
        waiting = self._batcher.remove(cancel.client, lambda job: job.request.id == cancel.id)
        resort = self._escalated.pop((cancel.client, cancel.id), None)
        if resort is not None:
            resort.abandon()
            waiting = True
        if waiting:
            self.desk.cancelled(cancel.client, cancel.id)

    def _admit(self, request: Request, payload: frame.Buffer, arrived_s: float) -> None:
        if not self.desk.is_new(request, arrived_s):
            return
        model = self._models.get(request.family)
        if model is None:
            raise FamilyMismatch(f"family {request.family!r} is not served here, {sorted(self._models)} are")
        entry, codec = model.entry(request)
        queue_s = self._batcher.queue_s(request.client)
        budget_s = request.deadline_ms / 1e3 - REPLY_RESERVE_S
        if queue_s > budget_s:
            self.desk.refuse_busy(request, queue_s)
            return
        features = codec.decode(payload)
        kept = bytes(payload) if model.forwards else b""
        job = Job(request, model, entry, features, kept, arrived_s, time.monotonic(), arrived_s + budget_s)
        if not self._batcher.put(request.client, job):
            self.desk.refuse_busy(request, queue_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            start_s = time.monotonic()
            groups: dict[int, list[Job]] = {}
            for job in batch:
                if job.due_s < start_s:
                    self.desk.expired(job.request)
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
                self.desk.fail(job.request, exc)
            return
        compute_ms = (time.monotonic() - start_s) * 1e3
        self.batches[len(jobs)] += 1
        answers: list[tuple[str, bytes]] = []
        for position, job in enumerate(jobs):
            reading = read(output.logits[position], model.exit.temperature)
            mine = Computed(job, reading, output.exit, (start_s - job.admitted_s) * 1e3, compute_ms)
            features = None if output.features is None else output.features[position]
            # One request must not take the others of its batch with it.
            self.desk.guarded(job.request, partial(self._settle, mine, features, answers))
        self._send(answers)

    def _settle(self, mine: Computed, features: Features | None, answers: list[tuple[str, bytes]]) -> None:
        """Add this exit's answer to `answers`, or send the features further up."""
        decision: Decision = LAST_EXIT
        if mine.job.model.next_split is not None:
            decision = self._decide(mine, mine.job.model.next_split)
        if isinstance(decision, Keep):
            request = mine.job.request
            reply = self._reply(mine, decision)
            answers.append((topics.reply(request.client), self.desk.finish(request, reply, mine.job.arrived_s)))
        else:
            self._escalate(mine, decision, features)

    def _decide(self, mine: Computed, next_split: str) -> Decision:
        model = mine.job.model
        uplink = self._uplinks.get(model.family.id)
        confidence, threshold = mine.reading.confidence, model.exit.threshold
        test = self.desk.is_test(mine.job.request)
        if uplink is None or confidence >= threshold or test or not model.leads_up(mine.job.request.split):
            routes: Sequence[Route] | NoRoute = NOTHING_ABOVE
        else:
            routes = uplink.routes(next_split, model.rates_up(mine.job.request.codec, len(mine.job.payload)))
        return decide(confidence, threshold, routes, mine.job.due_s - time.monotonic())

    def _escalate(self, mine: Computed, decision: Offload, features: Features | None) -> None:
        request = mine.job.request
        payload = mine.job.payload
        if features is not None:
            payload = mine.job.model.family.codec(decision.route.split, decision.codec).encode(features)
        uplink = self._uplinks[mine.job.model.family.id]
        resort = uplink.request(decision, request.id, payload, mine.job.due_s - time.monotonic())
        self.desk.counts["escalated"] += 1
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
            reply = self._reply(mine, Keep(f"{exc.code}: {exc}", degraded=True))
        else:
            hops = [mine.hop(self._node, self._tier, answered.bytes_up), *answered.reply.hops]
            reply = msgspec.structs.replace(answered.reply, id=request.id, hops=hops)
        self.desk.answer(request, reply, mine.job.arrived_s)

    def _reply(self, mine: Computed, keep: Keep) -> Reply:
        """This exit's own."""
        return Reply(
            id=mine.job.request.id,
            label=mine.reading.label,
            confidence=mine.reading.confidence,
            tier=self._tier,
            exit=mine.exit,
            degraded=keep.degraded,
            reason=keep.reason[:512],
            hops=[mine.hop(self._node, self._tier, 0)],
        )

    def _send(self, answers: Sequence[tuple[str, bytes]]) -> None:
        """All at once: each send may hand the interpreter to the network thread, which decodes before it is back."""
        try:
            self._publish_all(answers)
        except LinkError as exc:
            self.desk.lost(len(answers), exc)
