"""What /v1/ktk tells of a running server, for its page and for scripts: one JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ktk import __version__
from ktk.generate.engine import Engine
from ktk.generate.open import OpenModel
from ktk.integration.transformers.fast_paths import memory_paths, run_paths
from ktk.machine import cpu
from ktk.server.metrics import Metrics


class State:
    """Of one server whose engine has been started."""

    def __init__(self, opened: OpenModel, engine: Engine, metrics: Metrics) -> None:
        self._opened, self._engine, self._metrics = opened, engine, metrics
        # Not asked again: it reads the process's whole map of memory.
        self._memory_paths = memory_paths(opened.model)

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes, means in seconds, None before the first answer.

        process_bytes : of memory that the process holds and no file backs. prefix_tokens : of
        prefix_looked_up, tokens of prompts whose keys and values were there.
        """
        found, engine = self._opened.description, self._engine
        free, pages = engine.cache_pages
        matched, looked_up = engine.prefix_tokens
        total, available = cpu.memory()
        paths = [
            *run_paths(self._opened.model, engine.why_alone, engine.why_not_native),
            *self._memory_paths,
        ]
        report = self._opened.residency()
        return {
            "model": self._opened.name,
            "ktk": __version__,
            "architecture": found.architecture,
            "weight_format": found.weight_format,
            "bits_per_weight": found.bits_per_weight,
            "backend": found.backend,
            "kernel": found.kernel,
            "expert_bytes": found.expert_bytes,
            "other_bytes": found.rest_bytes,
            "process_bytes": process_bytes(),
            "memory_total_bytes": total,
            "memory_available_bytes": available,
            "expert_memory": None if report is None else report.to_json(),
            "num_moe_layers": found.num_moe_layers,
            "num_experts": found.num_experts,
            "num_experts_per_tok": found.num_experts_per_tok,
            "physical_cores": cpu.num_physical_cores(),
            "context": engine.limits.context,
            "kv_cache_bytes": engine.cache_bytes,
            "kv_cache_pages": pages,
            "kv_cache_pages_free": free,
            "kv_swap": None if engine.swap is None else engine.swap.to_json(),
            "prefix_tokens": matched,
            "prefix_looked_up": looked_up,
            "kv_disk": None if engine.kept is None else engine.kept.to_json(),
            "reused_tokens": {"memory": engine.reuse.memory, "disk": engine.reuse.disk},
            "requests_running": engine.running,
            "requests_waiting": engine.waiting,
            "most_running": engine.limits.running,
            "largest_batch": engine.largest_batch,
            "tokens_per_second": round(engine.tokens_per_second, 2),
            **self._metrics.totals(),
            "fast_paths": [path.to_json() for path in paths],
        }


def process_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Memory of this process that no file backs; 0 if the system does not tell."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(sizes[0]) * 1024 if sizes else 0
