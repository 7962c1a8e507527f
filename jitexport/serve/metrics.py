"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "jitexport_requests", "Answered requests, by bundle and status (499: the client went away)",
            ["bundle", "status"], registry=registry,
        )
        self.images = Counter("jitexport_images", "Images made", ["bundle"], registry=registry)
        self.abandoned = Counter(
            "jitexport_images_abandoned", "Images given up: the client went away or time ran out", ["bundle"],
            registry=registry,
        )
        self.failed = Counter("jitexport_images_failed", "Images that failed", ["bundle"], registry=registry)
        self.refusals = Counter("jitexport_refusals", "Refused requests, by reason", ["reason"], registry=registry)
        self.queue = Gauge("jitexport_queue_images", "Images that wait", registry=registry)
        self.running = Gauge("jitexport_running_images", "Images that are being made", registry=registry)
        self.loaded = Gauge("jitexport_loaded", "1 where the bundle is loaded", ["bundle"], registry=registry)
        self.loads = Counter("jitexport_loads", "Bundles loaded, by outcome", ["bundle", "outcome"], registry=registry)
        self.fill = Histogram(
            "jitexport_batch_fill", "Images of a batch over what it has room for", ["bundle"],
            buckets=(0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1), registry=registry,
        )
        self.seconds = Histogram(
            "jitexport_phase_seconds", "Seconds by phase: queue, prepare, first_step (with the text), steps, decode, "
            "encode; of a batch, but queue and encode of an image", ["bundle", "phase"], buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "jitexport_request_seconds", "Seconds from a request's arrival to its last image", ["bundle"],
            buckets=_SECONDS, registry=registry,
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
