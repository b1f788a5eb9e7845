"""The worker for language models: admits verifications, computes them in passes that many sessions share.

The network thread unpacks, decodes and admits; one thread of the worker's own holds the sessions and runs the graphs.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial

from kinflow import frame, topics
from kinflow.awaited import Answered
from kinflow.errors import FamilyMismatch
from kinflow.messages import Cancel, Probe, Release, Served, Tier, Verdict, Verify
from kinflow.settings import ServerSettings
from kinflow.uplink import Uplink
from kinflow_edge.desk import REPLY_RESERVE_S, Desk
from kinflow_edge.text import engine
from kinflow_edge.text.above import Above, Asked
from kinflow_edge.text.job import Job
from kinflow_edge.text.model import ServedText
from kinflow_edge.text.stages import Stages
from kinflow_edge.text.store import Bounds, Sessions
from kinflow_edge.text.turns import Turns

log = logging.getLogger("kinflow.worker")

# How often an idle worker looks after its sessions, and after what it asked the tier above.
IDLE_S = 0.5
ASKED_S = 0.05
# What was admitted and is not through by then, a server that stops leaves.
CLOSE_S = 10.0
# What a usual verification needs, for whoever asks how long the queue is.
USUAL_POSITIONS = 4


class TextWorker:
    """Serves `models` (by family id) for one node."""

    def __init__(
        self,
        node: str,
        tier: Tier,
        models: Mapping[str, ServedText],
        settings: ServerSettings,
        *,
        publish: Callable[[str, bytes], None],
        uplinks: Mapping[str, Uplink],
        test_client: str = "",
    ) -> None:
        """`test_client`: whose requests are the server's own test: decided here, and not counted."""
        self.desk = Desk(node, publish, settings.requests_per_s_per_device, test_client)
        self._models = dict(models)
        self._size, self._per_client = settings.queue_size, settings.queue_size_per_device
        self._chunk = settings.sessions.chunk
        held = settings.sessions
        bounds = Bounds(held.most, held.per_client, held.cache_mb << 20, held.idle_s, held.keep_s)
        self.sessions = Sessions(bounds)
        self._turns = Turns(settings.batch_size, self._chunk)
        above = {name: Above(self._models[name], uplink, self._came_back) for name, uplink in uplinks.items()}
        self.stages = Stages(tier, self.desk, self.sessions, self._turns, above, self._ended)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._admitted: Counter[str] = Counter()
        """Jobs that have no answer yet, by client."""
        self._lock = threading.Lock()
        self.batches: Counter[int] = Counter()
        """Passes, by how many sessions shared them."""
        self.positions = 0
        """Positions computed, those of all passes."""
        self.busy_s = 0.0
        """Seconds spent on passes since the start."""
        self._look_s = 0.0
        self._closing = False
        self._end_s = math.inf
        self._thread = threading.Thread(target=self._run, name="kinflow-text", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Finish what was admitted, without the tier above, then end."""
        self._inbox.put(self._close)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def families(self) -> list[Served]:
        return [model.served() for model in self._models.values()]

    @property
    def queue_s(self) -> float:
        """How long a usual verification that came now would take."""
        return self._turns.wait_s(USUAL_POSITIONS)

    @property
    def under_way(self) -> int:
        """Verifications that were admitted and have no answer yet."""
        return self._admitted.total()

    # Network thread

    def on_message(self, topic: str, data: frame.Buffer) -> None:
        """Never computes, never raises."""
        arrived_s = time.monotonic()
        found = self.desk.read(topic, data, (Verify, Release, Cancel, Probe))
        if found is None:
            return
        message, payload = found
        if isinstance(message, Probe):
            self.desk.echo(message, self.queue_s)
        elif isinstance(message, Cancel):
            self._inbox.put(partial(self.stages.cancel, message))
        elif isinstance(message, Release):
            self._inbox.put(partial(self.stages.release, topics.family_of(topic), message))
        elif isinstance(message, Verify):
            self.desk.guarded(message, partial(self._admit, message, payload, arrived_s))

    def _admit(self, verify: Verify, payload: frame.Buffer, arrived_s: float) -> None:
        if not self.desk.is_new(verify, arrived_s):
            return
        model = self._models.get(verify.family)
        if model is None:
            raise FamilyMismatch(f"family {verify.family!r} is not served here, {sorted(self._models)} are")
        way = model.way(verify.split, verify.exit)
        budget_s = verify.deadline_ms / 1e3 - REPLY_RESERVE_S
        wait_s = self._turns.wait_s(verify.count)
        tokens, features = model.read(verify, payload)
        if wait_s > budget_s or not self._takes(verify.client):
            self.desk.refuse_busy(verify, wait_s)
            return
        times = arrived_s, time.monotonic(), arrived_s + budget_s
        job = Job(verify, model, way, tokens, features, *times, self.desk.is_test(verify), verify.count)
        begin, undo = partial(self.stages.begin, job), partial(self.stages.undo, job)
        self._inbox.put(partial(self.desk.guarded, verify, begin, undo))

    def _takes(self, client: str) -> bool:
        """Whether there is room for one more of this client; then it is taken."""
        with self._lock:
            if self._admitted.total() >= self._size or self._admitted[client] >= self._per_client:
                return False
            self._admitted[client] += 1
            return True

    def _came_back(self, asked: Asked, done: Future[Answered[Verdict]]) -> None:
        job = asked.job
        handle = partial(self.stages.came_back, asked, done)
        self._inbox.put(partial(self.desk.guarded, job.verify, handle, partial(self.stages.undo, job)))

    # The worker's thread

    def _run(self) -> None:
        while time.monotonic() < self._end_s and not (self._closing and not self.under_way):
            self._read_inbox()
            if batch := self._turns.next():
                self._pass(batch)
            now_s = time.monotonic()
            if now_s >= self._look_s:
                self._look_s = now_s + ASKED_S
                self.stages.look_after(now_s)

    def _read_inbox(self) -> None:
        """What came meanwhile; where there is nothing to compute, what comes next."""
        patience_s = 0.0 if len(self._turns) else ASKED_S if self.stages.asked else IDLE_S
        try:
            self._guarded(self._inbox.get(timeout=patience_s) if patience_s else self._inbox.get_nowait())
            while True:
                self._guarded(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _guarded(self, handle: Callable[[], None]) -> None:
        try:
            handle()
        except Exception:  # whatever it is, others have nothing to do with it
            log.exception("internal error")

    def _close(self) -> None:
        self._closing = True
        self._end_s = time.monotonic() + CLOSE_S
        self.stages.give_up_above()

    def _pass(self, batch: list[Job]) -> None:
        start_s = time.monotonic()
        for job in [job for job in batch if job.due_s < start_s]:
            batch.remove(job)
            self.stages.drop(job)
        if not batch:
            return
        counts = [min(job.left, self._chunk) for job in batch]
        try:
            engine.run(batch[0].model, [job.feeding for job in batch], self._chunk)
            self.stages.passed(batch, start_s)
        except Exception as exc:
            for job in batch:
                self.stages.undo(job)
                self.desk.fail_with(job.verify, exc)
        spent_s = time.monotonic() - start_s
        self.busy_s += spent_s
        self.batches[len(batch)] += 1
        self.positions += sum(counts)
        self._turns.took(max(counts), spent_s)

    def _ended(self, job: Job) -> None:
        with self._lock:
            self._admitted[job.verify.client] -= 1
            if not self._admitted[job.verify.client]:
                del self._admitted[job.verify.client]
