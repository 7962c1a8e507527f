"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
FILL = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._declare()

    def _declare(self) -> None:
        bundle = ["bundle"]
        self.requests = self._counter(
            "jitexport_requests", "Answered requests, by bundle and status (499: the client went away)",
            ["bundle", "status"],
        )
        self.images = self._counter("jitexport_images", "Images made", bundle)
        self.abandoned = self._counter(
            "jitexport_images_abandoned", "Images given up: the client went away or time ran out", bundle
        )
        self.failed = self._counter("jitexport_images_failed", "Images that failed", bundle)
        self.refusals = self._counter("jitexport_refusals", "Refused requests, by reason", ["reason"])
        self.queue = self._gauge("jitexport_queue_images", "Images that wait")
        self.running = self._gauge("jitexport_running_images", "Images that are being made")
        self.loaded = self._gauge("jitexport_loaded", "1 where the bundle is loaded", bundle)
        self.loads = self._counter("jitexport_loads", "Bundles loaded, by outcome", ["bundle", "outcome"])
        self.fill = self._histogram(
            "jitexport_batch_fill", "Images of a batch over what it has room for", bundle, FILL
        )
        self.seconds = self._histogram(
            "jitexport_phase_seconds", "Seconds by phase: queue, prepare, first_step (with the text), steps, decode, "
            "encode (with those of the batch before it); of a batch, but queue and encode of an image",
            ["bundle", "phase"],
        )
        self.request_seconds = self._histogram(
            "jitexport_request_seconds", "Seconds from a request's arrival to its last image", bundle
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float] = SECONDS) -> Any:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def text(self) -> bytes | None:
        """All of it, as Prometheus reads it; None where it is read elsewhere."""
        return generate_latest(self.registry)
