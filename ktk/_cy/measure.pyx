# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True
"""Thin wrapper over the loops that measure the machine's ceilings (ktk_roof.h). No arithmetic."""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc


def peaks():
    """Every peak this build can measure: list of (ISA row, name,
    CPU features needed beyond the row's), slowest row first.
    """
    cdef const ktk_roof *row
    cdef int i = 0, j
    found = []
    while ktk_roof_row(i) != NULL:
        row = ktk_roof_row(i)
        found += [(row.name.decode(), row.peaks[j].name.decode(),
                   tuple(row.peaks[j].needs.decode().split()))
                  for j in range(row.num_peaks)]
        i += 1
    return found


def patterns():
    """Every way to read memory: list of (ISA row, name), slowest row first."""
    cdef const ktk_roof *row
    cdef int i = 0, j
    found = []
    while ktk_roof_row(i) != NULL:
        row = ktk_roof_row(i)
        found += [(row.name.decode(),
                   row.patterns[j].name.decode()) for j in range(row.num_patterns)]
        i += 1
    return found


cdef class _Cpus:
    """One CPU number a thread, as C reads them."""

    cdef int32_t *numbers
    cdef int count

    def __cinit__(self, cpus):
        self.count = len(cpus)
        if not self.count:
            raise ValueError("cpus is empty: must name one CPU a thread, -1 for any")
        self.numbers = <int32_t *>malloc(self.count * sizeof(int32_t))
        if self.numbers == NULL:
            raise MemoryError
        for i, cpu in enumerate(cpus):
            self.numbers[i] = cpu

    def __dealloc__(self):
        free(self.numbers)


cdef _rate(double rate, int threads):
    if rate < 0:
        raise MemoryError(f"cannot start {threads} threads")
    return rate


def peak(str isa, str name, cpus, double seconds):
    """Multiply-adds per second of a peak, all threads together. The caller has checked that the CPU
    runs it.

    cpus : one CPU number a thread, -1 for any.
    """
    cdef _Cpus at = _Cpus(cpus)
    cdef const ktk_roof *row
    cdef int i = 0, j
    cdef double rate
    while ktk_roof_row(i) != NULL:
        row = ktk_roof_row(i)
        for j in range(row.num_peaks):
            if row.name.decode() == isa and row.peaks[j].name.decode() == name:
                with nogil:
                    rate = ktk_roof_measure_peak(&row.peaks[j], at.count, at.numbers, seconds)
                return _rate(rate, at.count)
        i += 1
    raise ValueError(f"peak {isa!r}, {name!r}: this build has {peaks()}")


def read(str isa, str name, const uint8_t[::1] buffer, int64_t start, cpus, double seconds):
    """Bytes per second read by a pattern, all threads together.

    buffer : uint8 (n,), 64-byte aligned, at least 1 MiB a thread; each thread reads its own part,
        from ``start`` on.
    """
    cdef _Cpus at = _Cpus(cpus)
    cdef const ktk_roof *row
    cdef int i = 0, j
    cdef double rate
    if buffer.shape[0] < at.count * (1 << 20) or start < 0:
        raise ValueError(f"buffer has {buffer.shape[0]} bytes, start={start}: must be 1 MiB a "
                         f"thread, and not negative")
    while ktk_roof_row(i) != NULL:
        row = ktk_roof_row(i)
        for j in range(row.num_patterns):
            if row.name.decode() == isa and row.patterns[j].name.decode() == name:
                with nogil:
                    rate = ktk_roof_measure_read(&row.patterns[j], &buffer[0], buffer.shape[0],
                                                 start,
                                                 at.count, at.numbers, seconds)
                return _rate(rate, at.count)
        i += 1
    raise ValueError(f"pattern {isa!r}, {name!r}: this build has {patterns()}")


def touch(uint8_t[::1] buffer, cpus):
    """Write each thread's part of ``buffer`` from its own CPU,
    so that every page has memory near its reader.
    """
    cdef _Cpus at = _Cpus(cpus)
    cdef int status
    with nogil:
        status = ktk_roof_touch(&buffer[0], buffer.shape[0], at.count, at.numbers)
    _rate(status, at.count)
