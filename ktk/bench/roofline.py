"""Ceilings of the machine: what memory and each kind of arithmetic instruction give at this moment.

On a shared machine both halve and recover within seconds, so they are sampled in pieces short
enough to stand between calls of what they are compared with.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ktk._cy import measure_module
from ktk.errors import BackendError
from ktk.experts.formats import PANELS
from ktk.machine import cpu
from ktk.machine.memory import aligned_buffer

READ = "read"
SAMPLE_SECONDS = 0.03
MIN_BUFFER_BYTES = 512 << 20
# The three fastest ways to read keep within a few percent of each other, and which of them leads
# changes.
KEPT_PATTERNS = 3
# GGUF types with codes of eight bits: without VNNI they are widened to 16 before they are
# multiplied, others are not.
WIDE_TYPES = ("Q8_0", "IQ4_NL", "IQ4_XS")
SETTLE_SECONDS = 0.005  # threads of the last call spin before they sleep


class Peak(NamedTuple):
    """A kind of instruction: the ISA row whose loop measures it, its name,
    and the CPU features it lacks here.
    """

    isa: str
    name: str
    missing: tuple[str, ...]


class Bound(NamedTuple):
    """The least time a call can take, in seconds, and what sets it: "memory" or "compute"."""

    seconds: float
    by: str


def bound(touched_bytes: float, operations: float, read: float, peak: float) -> Bound:
    """The larger of touched_bytes / read (bytes/s) and operations / peak (operations/s)."""
    memory, compute = touched_bytes / read, operations / peak
    return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


def peaks() -> list[Peak]:
    """Every peak this build knows, slowest ISA row first.

    BackendError if the extension is not built.
    """
    features = cpu.detect()
    found = []
    for isa, name, needs in _measure().peaks():
        lacking = [*cpu.missing(isa, features), *(f for f in needs if f not in features)]
        found.append(Peak(isa, name, tuple(lacking)))
    return found


def peak_of(kernel: str, weight_format: str) -> str:
    """The peak that a kernel's inner loop is held against.

    kernel : as backends name it, its ISA row first ("avx512vnni int4 g32"); for others the best row
        of this CPU counts.
    """
    isa = kernel.split(" ")[0]
    if isa not in cpu.ISA_LEVELS:
        isa = cpu.best_isa() or "avx2"
    if isa == "amxbf16" and weight_format == "bf16":
        return "amx bf16"
    # What these levels add is for bf16 alone.
    isa = {"avx512bf16": "avx512vnni", "amxbf16": "amx"}.get(isa, isa)
    fmt = PANELS[weight_format]
    if not fmt.is_integer:
        return "avx2 fp32" if isa == "avx2" else "avx512 fp32"  # products and sums are fp32
    if isa in ("avx2", "avx512") and fmt.bits < 8:
        return f"{isa} int4"
    return f"{isa} int8"  # smaller codes are widened to bytes


def peak_of_blocks(isa: str, kind: str) -> str:
    """The same for a kernel over GGUF blocks. isa : the best level of any. kind : the ggml type."""
    if kind == "BF16" and isa == "avx512bf16":
        return "avx512 bf16"
    if kind in ("F32", "F16", "BF16"):
        return peak_of(isa, "fp32")
    return peak_of(isa, "int8" if kind in WIDE_TYPES else "int4")


def _measure() -> Any:
    module = measure_module()
    if module is None:
        raise BackendError(
            "ceilings need the compiled extension, which is not built: reinstall with a C compiler"
        )
    return module


def l3_bytes(root: Path | str = "/") -> int:
    """Bytes of all last-level caches that CPUs of this process see; 0 if unknown."""
    caches: dict[str, int] = {}
    for number in cpu.allowed_cpus():
        folder = Path(root) / f"sys/devices/system/cpu/cpu{number}/cache/index3"
        try:
            size = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        if size.endswith("K") and size[:-1].isdigit():
            caches[shared] = int(size[:-1]) << 10
    return sum(caches.values())


def cpus_for(num_threads: int, root: Path | str = "/") -> list[int]:
    """A CPU for each thread: every physical core once, then their second threads,
    then from the start again.
    """
    cores = cpu.cores_of(tuple(cpu.allowed_cpus()), root)
    depth = max(map(len, cores))
    ordered = [core[i] for i in range(depth) for core in cores if i < len(core)]
    return [ordered[i % len(ordered)] for i in range(num_threads)]


class Roofline:
    """Samples ceilings on ``num_threads`` threads, one a core, and keeps every sample.

    num_threads : default KTK_NUM_THREADS or the physical cores. buffer_bytes : memory that is read,
    in huge pages, allocated at the first sample; default four times the last-level caches, at least
    512 MiB.
    Raises BackendError if the extension is not built.
    """

    def __init__(self, num_threads: int | None = None, buffer_bytes: int | None = None) -> None:
        self._measure = _measure()
        self.num_threads = num_threads or cpu.default_threads()
        self.buffer_bytes = buffer_bytes or max(MIN_BUFFER_BYTES, 4 * l3_bytes())
        self.cpus = cpus_for(self.num_threads)
        self.peaks = {p.name: p for p in peaks()}
        self.samples: dict[str, list[float]] = {}
        self._buffer: np.ndarray | None = None
        self._start = 0
        # Of every row that runs: wider loads are not always the faster ones.
        self._patterns: dict[tuple[str, str], list[float]] = {
            (isa, name): []
            for isa, name in self._measure.patterns()
            if not cpu.missing(isa, cpu.detect())
        }

    @property
    def names(self) -> list[str]:
        """Every ceiling that can be measured here."""
        return [
            *([READ] if self._patterns else []),
            *(p.name for p in self.peaks.values() if not p.missing),
        ]

    def check(self, name: str) -> None:
        """ValueError if a ceiling is unknown, BackendError if this CPU lacks it."""
        if name == READ and self._patterns:
            return
        if name not in self.peaks:
            raise ValueError(f"ceiling {name!r}: must be one of {READ}, {', '.join(self.peaks)}")
        if self.peaks[name].missing:
            raise BackendError(f"ceiling {name!r}: CPU lacks {', '.join(self.peaks[name].missing)}")

    def sample(self, names: list[str], seconds: float = SAMPLE_SECONDS) -> dict[str, float]:
        """Measure each once, ``seconds`` each.

        Bytes/s for "read", else operations/s (two a multiply-add).
        """
        for name in names:
            self.check(name)
        time.sleep(SETTLE_SECONDS)
        found = {name: self._sample(name, seconds) for name in names}
        for name, value in found.items():
            self.samples.setdefault(name, []).append(value)
        return found

    def _sample(self, name: str, seconds: float) -> float:
        if name == READ:
            return self._sample_read(seconds)
        return 2.0 * float(self._measure.peak(self.peaks[name].isa, name, self.cpus, seconds))

    def _sample_read(self, seconds: float) -> float:
        """The best pattern's rate; all are tried the first time, later those that were best."""
        if self._buffer is None:
            self._buffer = aligned_buffer(self.buffer_bytes)
            self._measure.touch(self._buffer, self.cpus)
        best = sorted(self._patterns, key=lambda p: -statistics.median(self._patterns[p] or [0.0]))
        tried = best[:KEPT_PATTERNS] if self._patterns[best[0]] else best
        for isa, name in tried:
            rate = self._measure.read(
                isa, name, self._buffer, self._start, self.cpus, seconds / KEPT_PATTERNS
            )
            self._patterns[isa, name].append(rate)
            self._start += self.buffer_bytes // self.num_threads // 3  # not what was just read
        return max(self._patterns[p][-1] for p in tried)

    def report(self, skip: dict[str, int] | None = None) -> dict[str, dict[str, Any]]:
        """Per ceiling sampled: median, min, max and all samples, GB/s or GOP/s.

        skip : samples to leave out, from the first.
        """
        kept = {name: values[(skip or {}).get(name, 0) :] for name, values in self.samples.items()}
        return {
            name: {
                "unit": "GB/s" if name == READ else "GOP/s",
                "median": statistics.median(values) / 1e9,
                "min": min(values) / 1e9,
                "max": max(values) / 1e9,
                "samples": [value / 1e9 for value in values],
            }
            for name, values in kept.items()
            if values
        }
