"""What a server counts, as Prometheus reads it. Nothing is added to the way of a request: it is read when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kinflow_edge.text.worker import TextWorker

if TYPE_CHECKING:
    from kinflow_edge.server import Server


class ServerMetrics(Collector):
    """A collector for one server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server, workers = self._server, self._server.workers
        requests = CounterMetricFamily("kinflow_requests", "Requests by what became of them.", labels=["outcome"])
        for outcome, count in sorted(workers.counts.items()):
            requests.add_metric([outcome], count)
        yield requests
        batches = CounterMetricFamily("kinflow_batches", "Batches computed, by size.", labels=["size"])
        for size, count in sorted(workers.batches.items()):
            batches.add_metric([str(size)], count)
        yield batches
        yield CounterMetricFamily("kinflow_compute_seconds", "Time spent on batches.", value=workers.busy_s)
        yield GaugeMetricFamily("kinflow_queue_seconds", "How long a new request would wait.", value=workers.queue_s)
        yield GaugeMetricFamily("kinflow_under_way", "Requests admitted and not answered yet.", value=workers.under_way)
        yield GaugeMetricFamily(
            "kinflow_ready", "1 when a real inference succeeded lately.", value=server.state == "ready"
        )
        yield from self._sessions()
        yield from self._above()

    def _sessions(self) -> Iterator[Metric]:
        """Generations; nothing where no language model is served."""
        for worker in self._server.workers:
            if isinstance(worker, TextWorker):
                held = worker.sessions
                ended = CounterMetricFamily("kinflow_sessions_forgotten", "Sessions by why.", labels=["why"])
                ended.add_metric(["evicted"], held.evicted)
                ended.add_metric(["idle"], held.expired)
                yield ended
                yield GaugeMetricFamily("kinflow_sessions", "Generations held.", value=len(held))
                yield GaugeMetricFamily("kinflow_session_positions", "Positions they hold.", value=held.positions)
                yield GaugeMetricFamily("kinflow_session_bytes", "Memory of their caches.", value=held.cache_bytes)
                yield CounterMetricFamily("kinflow_passes", "Forward passes.", value=worker.batches.total())
                yield CounterMetricFamily("kinflow_positions", "Positions computed.", value=worker.positions)
                yield CounterMetricFamily(
                    "kinflow_redone", "Positions decided from token ids.", value=worker.stages.redone
                )

    def _above(self) -> Iterator[Metric]:
        """The nodes of the next tier, as this server sees them."""
        labels = ["family", "node"]
        round_trip = GaugeMetricFamily("kinflow_upstream_round_trip_seconds", "Estimated.", labels=labels)
        per_byte = GaugeMetricFamily("kinflow_upstream_seconds_per_byte", "Estimated.", labels=labels)
        loss = GaugeMetricFamily("kinflow_upstream_loss", "Share of requests without an answer.", labels=labels)
        failures = GaugeMetricFamily("kinflow_upstream_failures", "In a row; 3 open the breaker.", labels=labels)
        for family, uplink in self._server.uplinks.items():
            for peer in uplink.peers:
                where, estimate = [family, peer.node], peer.estimate
                round_trip.add_metric(where, estimate.round_trip_s)
                per_byte.add_metric(where, estimate.s_per_byte)
                loss.add_metric(where, estimate.loss)
                failures.add_metric(where, peer.breaker.failures)
        yield from (round_trip, per_byte, loss, failures)
