"""Which coding each of several matrices gets, so that the sum of losses is least within a budget.

A multiple-choice knapsack, solved by dynamic programming over what is spent beyond the smallest
codings: exact where the sizes have a common divisor that leaves at most STEPS steps, as in models
whose layers are alike; else sizes are rounded up to steps, so that no budget is exceeded and at
most one step a matrix is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

STEPS = 50_000


def allocate(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The choice of each matrix, an index into its own sizes and losses.

    sizes : in bytes, by matrix and choice; losses likewise, at least 0. Of choices that lose the
    same the smaller is taken. Raises ValueError if the smallest choices exceed ``budget`` bytes.
    """
    smallest = [min(row) for row in sizes]
    room = budget - sum(smallest)
    if room < 0:
        raise ValueError(f"{budget} bytes: the smallest choices take {sum(smallest)}")
    extra = [[size - low for size in row] for row, low in zip(sizes, smallest, strict=True)]
    most = sum(map(max, extra))
    room = min(room, most)
    unit = math.gcd(*(e for row in extra for e in row)) or 1
    unit = max(unit, -(-room // STEPS))
    steps = room // unit
    best = np.zeros(steps + 1)  # least loss of the matrices so far, by steps that may be spent
    taken = np.zeros((len(sizes), steps + 1), np.uint8)
    for at, (row, loss) in enumerate(zip(extra, losses, strict=True)):
        new = np.full(steps + 1, np.inf)
        for choice in sorted(range(len(row)), key=row.__getitem__):
            cost = -(-row[choice] // unit)
            if cost > steps:
                continue
            total = best[: steps + 1 - cost] + loss[choice]
            better = total < new[cost:]
            new[cost:][better] = total[better]
            taken[at, cost:][better] = choice
        best = new
    chosen, left = [], steps
    for at in reversed(range(len(sizes))):
        choice = int(taken[at, left])
        chosen.append(choice)
        left -= -(-extra[at][choice] // unit)
    return chosen[::-1]
