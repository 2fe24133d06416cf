"""The server's numbers, as Prometheus reads them: GET /metrics.

    metrics = Metrics(service); metrics.answered("/v1/models", 200, 0.002); metrics.text()

Labels have few values: routes by their pattern and never by what was asked for, models by the names they are served under.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from lyceum.serve.service import Service

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lyceum_requests", "Answered requests.", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "lyceum_request_seconds", "From a request to the end of its answer.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "lyceum_first_token_seconds", "From a request to its first token.", ("model",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("lyceum_prompt_tokens", "Tokens read.", ("model",), registry=self.registry)
        self.cached_tokens = Counter(
            "lyceum_cached_tokens", "Of them, tokens that were remembered.", ("model",), registry=self.registry
        )
        self.generated_tokens = Counter("lyceum_generated_tokens", "Tokens made.", ("model",), registry=self.registry)
        self.cancelled = Counter("lyceum_cancelled", "Requests whose client left.", ("model",), registry=self.registry)

    def watch(self, service: Service) -> None:
        """Also show what a service has under way."""
        self.registry.register(_Now(service))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """An answer has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is under way at the moment of asking; asked on the event loop."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        live = GaugeMetricFamily("lyceum_sequences", "Replies that wait or are being made.", labels=("model",))
        for served in self.service.models.values():
            live.add_metric([served.name], len(served.seat.live))
        yield live
        let_in = GaugeMetricFamily("lyceum_let_in", "Replies that were let in and have not been given back.")
        let_in.add_metric([], self.service.quota.running)
        yield let_in
        tasks = GaugeMetricFamily("lyceum_tasks", "Tasks of the event loop that asks, this one too.")
        tasks.add_metric([], len(asyncio.all_tasks()))
        yield tasks
        failures = CounterMetricFamily("lyceum_engine_failures", "Steps of an engine that failed.")
        failures.add_metric([], self.service.worker.num_failures)
        yield failures
