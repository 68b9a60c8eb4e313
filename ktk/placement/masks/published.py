"""What KTransformers measured of its strategies: reference data for ``simulate``.

Tokens/s of Qwen3-Next-80B-A3B-Instruct-FP8 on four RTX 4090 (tensor parallel) and a Xeon Gold
6454S, ShareGPT. Source: KTransformers, "CPU-GPU Expert Scheduling Tutorial", March 2026.
"""

from __future__ import annotations

DYNAMIC = "dynamic"  # its name there: dynamic-expert-update
STRATEGIES = ("random", "uniform", "front-loading", "frequency", DYNAMIC)
# Share of the experts on the GPUs -> tokens/s in the order of STRATEGIES.
TOKENS_PER_SECOND: dict[float, tuple[float, float, float, float, float]] = {
    0.0: (53.01, 52.96, 54.18, 52.72, 53.37),
    0.1: (56.63, 56.57, 57.18, 58.60, 70.22),
    0.2: (58.75, 60.28, 58.82, 61.92, 74.73),
    0.3: (62.86, 62.08, 63.87, 66.50, 75.55),
    0.4: (66.81, 66.82, 67.45, 72.78, 80.98),
    0.5: (70.38, 65.25, 73.65, 76.19, 81.17),
    0.6: (71.33, 72.80, 77.95, 82.33, 82.30),
    0.7: (74.40, 76.17, 81.59, 89.37, 88.70),
    0.8: (79.71, 79.20, 89.20, 100.67, 92.31),
    0.9: (88.82, 81.06, 98.14, 107.15, 95.04),
    1.0: (112.61, 112.32, 111.82, 114.26, 112.99),
}


def published(strategy: str, ratio: float) -> float | None:
    """Tokens/s, if that was measured."""
    of_ratio = TOKENS_PER_SECOND.get(round(ratio, 3))
    if of_ratio is None or strategy not in STRATEGIES:
        return None
    return of_ratio[STRATEGIES.index(strategy)]


def agreement(tokens_per_second: dict[tuple[str, float], float]) -> tuple[int, int]:
    """Of two strategies at one share, how often the given figures order them as measured, and of
    how many pairs. Pairs within 1 % of each other there are left out: measured twice they may
    change places, as all do at 0 and 1. tokens_per_second : by strategy and share.
    """
    same = pairs = 0
    for ratio, measured in TOKENS_PER_SECOND.items():
        if not 0 < ratio < 1:
            continue
        for i, one in enumerate(STRATEGIES):
            for j, other in enumerate(STRATEGIES[:i]):
                near = abs(measured[i] - measured[j]) <= 0.01 * measured[j]
                keys = (one, ratio), (other, ratio)
                if near or not all(key in tokens_per_second for key in keys):
                    continue
                got = tokens_per_second[keys[0]] - tokens_per_second[keys[1]]
                same += (got > 0) == (measured[i] > measured[j]) and got != 0
                pairs += 1
    return same, pairs
