"""One admitted request, and what this server found out about it."""

from __future__ import annotations

import time

import msgspec

from kinflow.codec import Features
from kinflow.confidence import Reading
from kinflow.messages import Hop, Request, Tier
from kinflow_edge.model import Entry, ServedFamily


class Job(msgspec.Struct, frozen=True, eq=False):
    """One admitted request."""

    request: Request
    model: ServedFamily
    entry: Entry
    features: Features
    payload: bytes
    """The features as they came, where they may be forwarded; else empty."""
    arrived_s: float
    admitted_s: float
    """When the features were decoded and the job was put into the queue."""
    due_s: float


class Computed(msgspec.Struct, frozen=True, eq=False):
    """A job that this server's own member has computed."""

    job: Job
    reading: Reading
    exit: str
    queue_ms: float
    compute_ms: float

    def hop(self, node: str, tier: Tier, bytes_up: int) -> Hop:
        decode_ms = (self.job.admitted_s - self.job.arrived_s) * 1e3
        total_ms = (time.monotonic() - self.job.arrived_s) * 1e3
        return Hop(node, tier, decode_ms, self.queue_ms, self.compute_ms, total_ms, bytes_up)
