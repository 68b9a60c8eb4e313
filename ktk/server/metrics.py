"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ktk.generate.engine import Engine
from ktk.placement.residency.report import ResidencyReport
from ktk.server.kv_metrics import KvCollector

LATENCY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of its own.

    residency : which experts are in memory, None where all are.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        residency: Callable[[], ResidencyReport | None] = lambda: None,
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        info = Gauge("ktk_model", "The model served; always 1.", ["model"], registry=self.registry)
        info.labels(model).set(1)
        self.requests = Counter(
            "ktk_requests",
            "Answered requests by route and HTTP status; 499: the client went away.",
            ["route", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "ktk_prompt_tokens", "Tokens of accepted prompts.", registry=self.registry
        )
        self.generated_tokens = Counter(
            "ktk_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self.first_token = Histogram(
            "ktk_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=LATENCY,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "ktk_time_per_output_token_seconds",
            "Between tokens of an answer, its mean.",
            buckets=LATENCY,
            registry=self.registry,
        )
        self.duration = Histogram(
            "ktk_request_seconds",
            "From the request to the end of its answer.",
            buckets=LATENCY,
            registry=self.registry,
        )
        for name, what, read in (
            ("ktk_requests_running", "Sequences being generated.", lambda: engine.running),
            (
                "ktk_requests_waiting",
                "Queue depth: requests whose turn has not come.",
                lambda: engine.waiting,
            ),
            (
                "ktk_tokens_per_second",
                "Generated tokens/s over the last ten seconds.",
                lambda: engine.tokens_per_second,
            ),
            (
                "ktk_kv_cache_pages_free",
                "Free pages of the KV cache.",
                lambda: engine.cache_pages[0],
            ),
            ("ktk_kv_cache_pages", "Pages of the KV cache.", lambda: engine.cache_pages[1]),
        ):
            Gauge(name, what, registry=self.registry).set_function(read)
        self.registry.register(GuessCollector(engine))
        self.registry.register(ResidencyCollector(residency))
        KvCollector(engine, self.registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def totals(self) -> dict[str, float | None]:
        """Since the start: tokens of prompts and answers, mean waits in seconds."""

        def value(name: str) -> float:
            return self.registry.get_sample_value(name) or 0.0

        def mean(name: str) -> float | None:
            count = value(f"{name}_count")
            return round(value(f"{name}_sum") / count, 4) if count else None

        return {
            "prompt_tokens": int(value("ktk_prompt_tokens_total")),
            "generated_tokens": int(value("ktk_generated_tokens_total")),
            "mean_time_to_first_token": mean("ktk_time_to_first_token_seconds"),
            "mean_time_per_output_token": mean("ktk_time_per_output_token_seconds"),
        }


# Of ktk.placement.residency.report.Counters. Of one scrape, hits + cold + in_flight are all uses.
RESIDENCY = {
    "hits": "Experts in memory when a call came.",
    "cold": "Experts that a call waited for; nobody was reading them.",
    "in_flight": "Experts that a call waited for while they were being read.",
    "evictions": "Experts that left memory for another.",
    "prefetches": "Experts read before a call asked.",
    "prefetch_hits": "Of those, used by the next call of their layer.",
    "cancelled": "Begun ahead of calls and never read.",
    "reads": "Experts read.",
    "read_bytes": "Bytes of experts read.",
    "failures": "Experts that could not be read.",
    "waits": "Calls that waited for room.",
}


class GuessCollector(Collector):
    """The metrics ktk_guessed_*."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, what, value in (
            ("ktk_guessed_tokens", "Tokens guessed from prompts.", self._engine.guessed),
            ("ktk_guessed_true_tokens", "Of those, that came true.", self._engine.came_true),
        ):
            yield CounterMetricFamily(name, what, value=value)


class ResidencyCollector(Collector):
    """The metrics ktk_expert_*, all of one moment; none where all experts are in memory."""

    def __init__(self, residency: Callable[[], ResidencyReport | None]) -> None:
        self._residency = residency

    def collect(self) -> Iterator[Metric]:
        report = self._residency()
        if report is None:
            return
        for name, what in RESIDENCY.items():
            count = getattr(report.counters, name)
            yield CounterMetricFamily(f"ktk_expert_{name}", what, value=count)
        for name, what, value in (
            ("ktk_experts", "Experts of all layers.", report.num_experts),
            ("ktk_experts_resident", "Experts in memory now.", report.resident),
            ("ktk_experts_room", "Experts that fit into memory.", report.capacity),
            ("ktk_expert_memory_bytes", "Their room.", report.capacity * report.slot_bytes),
        ):
            yield GaugeMetricFamily(name, what, value=value)
