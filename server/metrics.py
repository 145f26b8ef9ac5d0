"""Prometheus metrics, in a registry of this server's own. Names are those dashboards know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.engine.messages import EngineStats
from ..core.errors import QueueFullError
from ..core.types import RequestMetrics
from .router import EngineRouter, ServedModel

PREFIX = "trimaran:"
LABELS = ("model_name", "engine")
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_ITL = (*_SHORT, 2.5, 5.0)
_TTFT = (*_SHORT, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 480.0)
_TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))


class EngineCollector(Collector):
    """Gauges and counters that the engines keep themselves, read when scraped."""

    GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
        ("num_requests_running", "Sequences being computed.", lambda s: s.num_running),
        ("num_requests_waiting", "Requests in the queue.", lambda s: s.num_waiting),
        (
            "kv_cache_usage_perc",
            "Share of KV blocks in use (1 is all).",
            lambda s: s.kv_used / s.kv_total if s.kv_total else 0.0,
        ),
        ("iteration_tokens", "Tokens computed in the last step.", lambda s: s.last_step_tokens),
    )
    COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
        ("num_preemptions", "Sequences set back to waiting.", lambda s: s.num_preemptions),
        ("prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_hits),
        (
            "discarded_tokens",
            "Generated tokens that a stop string cut off.",
            lambda s: s.discarded_tokens,
        ),
        (
            "num_quarantined",
            "Prompts refused for a while: they failed a step of their own.",
            lambda s: s.num_quarantined,
        ),
    )

    def __init__(self, router: EngineRouter) -> None:
        self.router = router
        self.dropped_lines: Callable[[], int] = lambda: 0

    def collect(self) -> Iterable[Metric]:
        rows = [((model.name, str(model.index)), model.stats()) for model in self.router]
        for name, help, read in self.GAUGES:
            gauge = GaugeMetricFamily(PREFIX + name, help, labels=LABELS)
            for labels, stats in rows:
                gauge.add_metric(labels, read(stats))
            yield gauge
        for name, help, read in self.COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, help, labels=LABELS)
            for labels, stats in rows:
                counter.add_metric(labels, read(stats))
            yield counter
        yield self._cache_info(rows)
        yield self._memory()
        dropped = self.dropped_lines()
        yield CounterMetricFamily(PREFIX + "log_lines_dropped", "Lost log lines.", value=dropped)

    def _memory(self) -> Metric:
        gauge = GaugeMetricFamily(
            PREFIX + "memory_bytes",
            "Memory of the first rank, as planned from the configuration and as held after start.",
            labels=(*LABELS, "kind", "tag"),
        )
        for model in self.router:
            for kind, sizes in model.memory().items():
                for tag, size in sizes.items():
                    gauge.add_metric((model.name, str(model.index), kind, tag), size)
        return gauge

    def _cache_info(self, rows: list[tuple[tuple[str, str], EngineStats]]) -> Metric:
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info", "KV cache.", labels=(*LABELS, "num_gpu_blocks")
        )
        for labels, stats in rows:
            info.add_metric((*labels, str(stats.kv_total)), 1)
        return info


class Metrics:
    """What the server measures at its own edge."""

    def __init__(self, router: EngineRouter) -> None:
        self.registry = CollectorRegistry()
        self.collector = EngineCollector(router)
        self.registry.register(self.collector)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Of these, from cache.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.success = self._counter("request_success", "Finished requests.", "finished_reason")
        self.rejections = self._counter("admission_rejections", "Refused requests.", "reason")
        self.slow_readers = self._counter("slow_readers", "Streams cut off.")
        self.restarts = self._counter("engine_restarts", "Engines started again.")
        self.ttft = self._histogram("time_to_first_token_seconds", _TTFT)
        self.itl = self._histogram("inter_token_latency_seconds", _ITL)
        self.per_token = self._histogram("request_time_per_output_token_seconds", _ITL)
        self.e2e = self._histogram("e2e_request_latency_seconds", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", _LONG)
        self.inference = self._histogram("request_inference_time_seconds", _LONG)
        self.request_prompt = self._histogram("request_prompt_tokens", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", _TOKENS)

    def _counter(self, name: str, help: str, *extra: str) -> Counter:
        return Counter(PREFIX + name, help, (*LABELS, *extra), registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        text = name.replace("_", " ").capitalize() + "."
        return Histogram(PREFIX + name, text, LABELS, registry=self.registry, buckets=buckets)

    def count_rejection(self, model: ServedModel, error: BaseException) -> None:
        if isinstance(error, QueueFullError):
            self.rejections.labels(model.name, str(model.index), "queue_full").inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


@dataclass
class RequestTimer:
    """Observes one request of the engine: the gaps between its tokens, and the whole at its end."""

    metrics: Metrics
    model: ServedModel
    last: float = 0.0
    start: float = field(default_factory=time.monotonic)
    tokens: int = 0
    num_cached: int = 0

    def __post_init__(self) -> None:
        labels = (self.model.name, str(self.model.index))
        self._labels = labels
        self._itl = self.metrics.itl.labels(*labels)

    def on_tokens(self, count: int) -> None:
        now = time.monotonic()
        if not self.last:
            self.metrics.ttft.labels(*self._labels).observe(now - self.start)
        elif count:
            self._itl.observe((now - self.last) / count)
        self.last = now
        self.tokens += count

    def on_end(self, times: RequestMetrics, num_prompt: int, reasons: list[str]) -> None:
        """`times` are the engine's own; phases it does not know (0.0) are left out."""
        metrics, labels = self.metrics, self._labels
        if not self.last and times.first_token > times.arrival > 0:  # not streamed
            metrics.ttft.labels(*labels).observe(times.first_token - times.arrival)
            self.last = times.last_token
        metrics.prompt_tokens.labels(*labels).inc(num_prompt)
        metrics.prompt_tokens_cached.labels(*labels).inc(self.num_cached)
        metrics.generation_tokens.labels(*labels).inc(self.tokens)
        metrics.request_prompt.labels(*labels).observe(num_prompt)
        metrics.request_generation.labels(*labels).observe(self.tokens)
        for reason in reasons:
            metrics.success.labels(*labels, reason).inc()
        metrics.e2e.labels(*labels).observe(time.monotonic() - self.start)
        if self.tokens > 1 and self.last > times.first_token > 0:
            pace = (self.last - times.first_token) / (self.tokens - 1)
            metrics.per_token.labels(*labels).observe(pace)
        arrived, scheduled = times.arrival, times.first_scheduled
        first, last = times.first_token, times.last_token
        for histogram, begin, end in (
            (metrics.queue, arrived, scheduled),
            (metrics.prefill, scheduled, first),
            (metrics.decode, first, last),
            (metrics.inference, scheduled, last),
        ):
            if begin > 0 and end >= begin:
                histogram.labels(*labels).observe(end - begin)
