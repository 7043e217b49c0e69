"""The server's numbers, for Prometheus."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maxlm.inference.requests import SequenceOutput
from maxlm.serving.engine_loop import RequestStream

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class ServerMetrics(Collector):
    """Counters and histograms of one server, in a registry of their own.

    Args:
        read_stats: returns the engine's ``EngineStats``, or None; each of its fields is a gauge
            ``maxlm_NAME``, and a counter where the name ends in ``_total``.
    """

    def __init__(self, read_stats: Callable[[], Any]):
        self.registry, self._read_stats = CollectorRegistry(), read_stats
        self.registry.register(self)
        about: dict[str, Any] = {"registry": self.registry, "namespace": "maxlm"}
        text = "Answers, by path and status"
        self.requests = Counter("requests", text, ["path", "code"], **about)
        name, text = "time_to_first_token_seconds", "From a request to a sequence's first token"
        self._first = Histogram(name, text, buckets=_SECONDS, **about)
        text = "Between tokens of a sequence; a step's tokens share its time"
        self._between = Histogram("inter_token_seconds", text, buckets=_SECONDS, **about)
        self._duration = Histogram("request_seconds", "From a request to its last token", **about)

    async def time_outputs(self, stream: RequestStream) -> AsyncIterator[SequenceOutput]:
        """Passes a stream's outputs on, and observes when they come."""
        last: dict[tuple[str, int], float] = {}
        async for output in stream:
            now, key = time.monotonic(), (output.request_id, output.sequence_index)
            if count := len(output.token_ids):
                if key not in last:
                    self._first.observe(now - stream.start_time)
                for _ in range(count if key in last else 0):
                    self._between.observe((now - last[key]) / count)
                last[key] = now
            yield output
        self._duration.observe(time.monotonic() - stream.start_time)

    def collect(self) -> Iterator[Metric]:
        """Yields the engine's numbers."""
        stats = self._read_stats()
        for name, value in stats._asdict().items() if stats else ():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            words = (
                name.removeprefix("num_").replace("_total", " since the start").replace("_", " ")
            )
            yield kind(f"maxlm_{name}", f"Engine: {words}", value=value)
