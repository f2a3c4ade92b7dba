"""What `/metrics` says: of the pipelines, and of HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from vlmforge.api.prometheus import PipelineCollector
from vlmforge.server.admission import Admission
from vlmforge.server.served import Served

_PATHS = frozenset(
    {
        "/",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/tokenize",
    }
)


class Metrics:
    """Counts requests by path and status; the pipelines count for themselves."""

    def __init__(self, engines: Mapping[str, Served], admission: Admission) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vlmforge_http_requests",
            "HTTP requests, by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "vlmforge_http_request_seconds",
            "Seconds from the first byte of a request to the last of its response.",
            ("path",),
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=self._registry,
        )
        for served in engines.values():
            self._registry.register(PipelineCollector(served.pipe, {"model": served.name}))
        running = Gauge(
            "vlmforge_http_requests_running",
            "Requests that are being answered or wait for it.",
            registry=self._registry,
        )
        running.set_function(lambda: admission.running)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Note a request that has ended; unknown paths are one."""
        shown = path if path in _PATHS else "other"
        self._requests.labels(shown, str(status)).inc()
        self._seconds.labels(shown).observe(seconds)

    def text(self) -> tuple[str, str]:
        """The text for Prometheus, and its media type."""
        return generate_latest(self._registry).decode("utf-8"), CONTENT_TYPE_LATEST
