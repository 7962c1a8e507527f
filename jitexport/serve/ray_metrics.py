"""The same counts as `metrics`, for Ray's own exporter: Prometheus reads them from each node, with `ray_` in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.util import metrics as ray_metrics

from jitexport.serve.metrics import SECONDS, Metrics


class RayMetrics(Metrics):
    """Counters of one replica. Ray says which one it is."""

    def __init__(self) -> None:
        self._declare()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return _Labelled(ray_metrics.Counter(f"{name}_total", text, tuple(labels)), labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        return _Labelled(ray_metrics.Gauge(name, text, tuple(labels)), labels)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float] = SECONDS) -> Any:
        return _Labelled(ray_metrics.Histogram(name, text, [float(b) for b in buckets], tuple(labels)), labels)

    def text(self) -> None:
        """Nothing: Ray shows them."""


class _Labelled:
    """A metric of Ray's with prometheus_client's calls."""

    def __init__(self, metric: Any, labels: Sequence[str], values: Sequence[str] = ()) -> None:
        self._metric = metric
        self._labels = labels
        self._tags = dict(zip(labels, values, strict=False))

    def labels(self, *values: str) -> _Labelled:
        return _Labelled(self._metric, self._labels, values)

    def inc(self, amount: float = 1) -> None:
        self._metric.inc(amount, self._tags)

    def set(self, value: float) -> None:
        self._metric.set(value, self._tags)

    def observe(self, value: float) -> None:
        self._metric.observe(value, self._tags)
