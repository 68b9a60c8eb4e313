"""The machine's ceilings: memory read in huge pages, and every kind of arithmetic this CPU has.

python bench/roofline.py [SAMPLES] [THREADS]

Default: 20 samples of 30 ms each, on the physical cores.
"""

from __future__ import annotations

import sys

from ktk.bench.roofline import Roofline
from ktk.machine import cpu


def main(samples: int = 20, threads: int | None = None) -> None:
    roofline = Roofline(threads)
    for _ in range(samples):
        roofline.sample(roofline.names)
    print(f"{cpu.brand()}, {roofline.num_threads} threads, {samples} samples")
    print(f"{'':22} {'median':>8} {'min':>8} {'max':>8}")
    for name, c in roofline.report().items():
        print(f"{name:22} {c['median']:8.1f} {c['min']:8.1f} {c['max']:8.1f} {c['unit']}")
    for peak in roofline.peaks.values():
        if peak.missing:
            print(f"{peak.name:22} not here: CPU lacks {', '.join(peak.missing)}")


main(*map(int, sys.argv[1:3]))
