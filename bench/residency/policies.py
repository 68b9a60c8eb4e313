"""Which policy is best: hit rates on made-up traces of several kinds, and on given ones.

    python bench/residency/policies.py [TRACE ...]

Prints a Markdown table, in per cent: mean over the traces of a kind, of one pool and of a pool for
each layer; and how far each policy is below Belady's optimum on average.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ktk.placement.residency.policies import POLICIES
from ktk.placement.residency.pools import PoolOptions
from ktk.placement.residency.replay import replay
from ktk.placement.residency.synthetic import Synthetic, synthetic_trace
from ktk.placement.residency.trace import Trace, read_trace

SHARES = (0.125, 0.25, 0.5, 0.75)
SIZE = {"num_layers": 12, "num_tokens": 320}
KINDS: dict[str, list[Synthetic]] = {
    "128 experts, 8 a token": [Synthetic(**SIZE, seed=seed) for seed in (1, 2)],
    "the same, subjects change fast": [Synthetic(**SIZE, drift=16, seed=3)],
    "the same, some experts are liked": [Synthetic(**SIZE, skew=1.0, seed=4)],
    "the same, a prompt of 128": [Synthetic(**SIZE, prompt=128, seed=5)],
    "64 experts, 8 a token": [Synthetic(**SIZE, num_experts=64, seed=6)],
    "256 experts, 8 a token": [Synthetic(**SIZE, num_experts=256, seed=7)],
}


def rates(trace: Trace, is_per_layer: bool) -> np.ndarray:
    """Hit rates (policies, shares); NaN where less than one token's experts fit."""
    calls, total = list(trace.each_call()), trace.num_layers * trace.num_experts
    found = np.full((len(POLICIES), len(SHARES)), np.nan)
    for i, name in enumerate(POLICIES):
        for j, share in enumerate(SHARES):
            if share * total >= trace.num_layers * trace.top_k:
                options = PoolOptions(round(share * total), name, is_per_layer=is_per_layer)
                found[i, j] = replay(trace, options, calls).total.hit_rate
    return found


def main() -> None:
    kinds = {kind: [synthetic_trace(o) for o in made] for kind, made in KINDS.items()}
    kinds |= {Path(name).stem: [read_trace(Path(name))] for name in sys.argv[1:]}
    gaps = []
    for kind, traces in kinds.items():
        both = [np.mean([rates(t, per_layer) for t in traces], axis=0) for per_layer in (0, 1)]
        table = np.concatenate(both, axis=1)
        gaps.append(np.nanmean(table[-1] - table, axis=1))
        print(f"\n{kind}\n\n| policy |" + "".join(f" {s:.1%} |" for s in SHARES) * 2)
        print("|---|" + "--:|" * table.shape[1])
        for name, row in zip(POLICIES, table, strict=True):
            cells = ("-" if np.isnan(x) else f"{100 * x:.1f}" for x in row)
            print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)
    print("\nBelow Belady, points, mean of all:")
    for name, gap in zip(POLICIES, np.mean(gaps, axis=0), strict=True):
        print(f"{name} {100 * gap:.2f}")


if __name__ == "__main__":
    main()
