"""What the server counts of pages on the disk, for Prometheus: kvc2's metrics, and what was spared.

Those of kvc2's that tell of a GPU's pages and of handles are not here: an engine has neither.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ktk.generate.engine import Engine
from ktk.kv.prefix.kept import KeptPages
from ktk.kv.swap import SwapSpace

BUCKETS = (1, 5, 10, 50, 100, 500, 1000, 5000, 10000)  # as kvc2 has them
# Of PrefixStore.
HISTOGRAMS = {
    "raw_insert_time_ms": "Writing a text's new pages to the disk.",
    "lookup_time_ms": "Reading a text's pages from the disk, until the last one is in memory.",
    "lookup_prefixmatch_length": "Tokens that a text looked up was found to begin with.",
    "matched_length_percentage": "Of its whole pages.",
}


class KvCollector(Collector):
    """The metrics ktk_kv_*; of an engine without pages on the disk what was spared and swapped."""

    def __init__(self, engine: Engine, registry: CollectorRegistry) -> None:
        self._engine = engine
        registry.register(self)
        if engine.kept is not None:
            histograms = {
                name: Histogram(f"ktk_kv_{name}", what, buckets=BUCKETS, registry=registry)
                for name, what in HISTOGRAMS.items()
            }

            def observe(name: str, value: float) -> None:
                if name in histograms:
                    histograms[name].observe(value)

            engine.kept.store.tiers.observe = observe

    def collect(self) -> Iterator[Metric]:
        reuse = self._engine.reuse
        reused = CounterMetricFamily(
            "ktk_kv_reused_tokens", "Tokens of prompts that were not computed.", labels=["from"]
        )
        reused.add_metric(["memory"], reuse.memory)
        reused.add_metric(["disk"], reuse.disk)
        yield reused
        if self._engine.swap is not None:
            yield from _of_swap(self._engine.swap)
        if self._engine.kept is not None:
            yield from _of(self._engine.kept)


def _of_swap(swap: SwapSpace) -> Iterator[Metric]:
    put_off = CounterMetricFamily(
        "ktk_kv_preemptions",
        "Requests that gave their pages to others, and what became of these.",
        labels=["pages"],
    )
    put_off.add_metric(["swapped"], swap.swapped_out)
    put_off.add_metric(["recomputed"], swap.recomputed)
    yield put_off
    moved = CounterMetricFamily(
        "ktk_kv_swapped_pages", "Pages copied to the swap space and back.", labels=["to"]
    )
    moved.add_metric(["swap"], swap.pages_out)
    moved.add_metric(["cache"], swap.pages_in)
    yield moved
    for name, what, value in (
        ("swap_bytes", "Bytes of pages in the swap space.", swap.num_bytes),
        ("swap_limit_bytes", "Bytes that it may have.", swap.limit),
    ):
        yield GaugeMetricFamily(f"ktk_kv_{name}", what, value=value)


def _of(kept: KeptPages) -> Iterator[Metric]:
    usage, pool, saved = kept.store.usage(kept.info), kept.pool, kept.saved
    for name, what, value in (
        ("prefix_nodes", "Pages that the store knows, of all models.", usage.pages),
        ("prefix_block_count", "Elements of the disk that they take.", usage.elements),
        ("disk_usage", "Bytes of the file of pages.", usage.disk_bytes),
        ("memory_pool_size", "Pages of the KV cache in memory.", pool.count),
        ("memory_pool_node_count", "Of those, full ones that texts may share.", pool.num_full),
        ("lru_entry_count", "Of those, full ones that no request holds.", pool.num_kept),
    ):
        yield GaugeMetricFamily(f"ktk_kv_{name}", what, value=value)
    for name, what, value in (
        ("saved_pages", "Pages written to the disk.", saved.pages),
        ("saved_bytes", "Their bytes.", saved.num_bytes),
        ("unsaved_texts", "Texts left out: the disk was behind, or failed.", saved.left_out),
    ):
        yield CounterMetricFamily(f"ktk_kv_{name}", what, value=value)
