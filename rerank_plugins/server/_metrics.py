"""What the server counts, for Prometheus."""

from __future__ import annotations

from rerank_plugins._extras import import_extra

__all__ = ["Metrics"]


class Metrics:
    """Counts of one application, in a registry of its own."""

    def __init__(self) -> None:
        prometheus = import_extra("prometheus_client", "serve")
        self._prometheus = prometheus
        self.registry = prometheus.CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = prometheus.Counter("rerank_requests", "Requests to rerank.", ["path", "status"], **own)
        self.seconds = prometheus.Histogram("rerank_request_seconds", "Time to rerank.", **own)
        self.texts = prometheus.Counter("rerank_texts", "Texts that were scored.", **own)
        self.running = prometheus.Gauge("rerank_requests_running", "Requests that are worked on.", **own)
        self.ready = prometheus.Gauge("rerank_ready", "1 once the model is warm, 0 before and while stopping.", **own)

    def text(self) -> tuple[bytes, str]:
        """The counts in Prometheus' text format, and its content type."""
        return self._prometheus.generate_latest(self.registry), str(self._prometheus.CONTENT_TYPE_LATEST)
