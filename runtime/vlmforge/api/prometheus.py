"""A pipeline's metrics for Prometheus: `pip install 'vlmforge[metrics]'`.

    registry = prometheus_client.CollectorRegistry()
    registry.register(PipelineCollector(pipe))
    prometheus_client.generate_latest(registry)

Names and units as https://prometheus.io/docs/practices/naming/ has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

from typing_extensions import override

from vlmforge.errors import ConfigError
from vlmforge.outputs.metrics import Histogram, Metrics

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError:
    raise ConfigError(
        "Metrics for Prometheus need a library that is not installed here.",
        found="no module prometheus_client",
        expected="the extra `metrics`",
        fix="pip install 'vlmforge[metrics]'",
    ) from None


class Measured(Protocol):
    """What has metrics: a `Pipeline`."""

    def metrics(self) -> Metrics:
        """As they are now."""


class PipelineCollector(Collector):
    """Reads a pipeline's metrics whenever Prometheus asks for them.

    Args:
        pipe: Whose.
        labels: Put on every one of them, such as the model's name.
    """

    def __init__(self, pipe: Measured, labels: Mapping[str, str] | None = None) -> None:
        self._pipe, self._labels = pipe, dict(labels or {})

    def describe(self) -> list[Metric]:
        """None: what is not described is not asked for when it is registered."""
        return []

    @override
    def collect(self) -> Iterator[Metric]:
        found = self._pipe.metrics()
        for name, label, values, words in (
            ("requests", "end", found.requests, "Answers that have ended, by how."),
            ("request_errors", "code", found.errors, "Answers that ended with an error, by code."),
        ):
            yield self._counters(name, label, values, words)
        for name, value, words in (
            ("prompt_tokens", found.prompt_tokens, "Tokens of prompts."),
            ("prompt_tokens_cached", found.cached_tokens, "Of these, found in the cache."),
            ("generated_tokens", found.generated_tokens, "Tokens of answers."),
            ("images_encoded", found.images_encoded, "Images that the vision part has run."),
            ("images_cached", found.images_cached, "Images of prompts that needed no encoding."),
            ("preemptions", found.preemptions, "Times that a request gave up its place."),
        ):
            yield self._counters(name, None, {"": value}, words)
        for name, value, words in (
            ("requests_waiting", found.waiting, "Requests that wait now."),
            ("requests_running", found.running, "Requests that run now."),
            ("cache_blocks_used", found.blocks_used, "Key/value blocks with tokens in them now."),
            ("cache_blocks", found.blocks_total, "Key/value blocks that there may be."),
        ):
            gauge = GaugeMetricFamily(f"vlmforge_{name}", words, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for name, histogram, words in (
            ("step_seconds", found.step_seconds, "Time of a step of the engine."),
            ("step_host_ratio", found.step_host_share, "Part of a step outside the engine."),
            ("time_to_first_token_seconds", found.first_token_seconds, "Request to first token."),
            ("time_between_tokens_seconds", found.between_tokens_seconds, "Token to token."),
            ("request_seconds", found.request_seconds, "Request to its end."),
        ):
            yield self._histogram(name, histogram, words)

    def _counters(
        self, name: str, label: str | None, values: Mapping[str, int], words: str
    ) -> Metric:
        names = [*self._labels, *([label] if label else [])]
        family = CounterMetricFamily(f"vlmforge_{name}", words, labels=names)
        for key, value in sorted(values.items()):
            family.add_metric([*self._labels.values(), *([key] if label else [])], value)
        return family

    def _histogram(self, name: str, histogram: Histogram, words: str) -> Metric:
        family = HistogramMetricFamily(f"vlmforge_{name}", words, labels=list(self._labels))
        buckets = [(_bound(bound), count) for bound, count in histogram.at_most()]
        family.add_metric(list(self._labels.values()), buckets, histogram.sum)
        return family


def _bound(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)
