"""Metrics of a service, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

KIND = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128)


class Figures:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("mgq_requests", "Requests for answers, by status.", ["status"], registry=self.registry)
        self.pictures = Counter("mgq_pictures", "Pictures, by outcome.", ["outcome"], registry=self.registry)
        self.in_work = Gauge("mgq_requests_in_work", "Requests in work now.", registry=self.registry)
        self.seconds = Histogram("mgq_request_seconds", "Upload to answer.", registry=self.registry, buckets=SECONDS)
        self.batch = Histogram(
            "mgq_batch_pictures", "Pictures that ran together.", registry=self.registry, buckets=PICTURES
        )
        self.network = Histogram("mgq_batch_seconds", "A batch in the engine.", registry=self.registry, buckets=SECONDS)

    def text(self) -> bytes:
        return generate_latest(self.registry)
