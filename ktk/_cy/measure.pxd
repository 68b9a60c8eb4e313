# The loops of ktk_roof.h, declared once.

from libc.stdint cimport int32_t, int64_t, uint8_t


cdef extern from "ktk_roof.h" nogil:
    ctypedef struct ktk_roof_peak:
        const char *name
        const char *needs

    ctypedef struct ktk_roof_pattern:
        const char *name
        int streams

    ctypedef struct ktk_roof:
        const char *name
        int num_peaks
        int num_patterns
        const ktk_roof_peak *peaks
        const ktk_roof_pattern *patterns

    const ktk_roof *ktk_roof_row(int index)
    double ktk_roof_measure_peak(const ktk_roof_peak *peak, int num_threads, const int32_t *cpus,
                                 double seconds)
    double ktk_roof_measure_read(const ktk_roof_pattern *pattern, const uint8_t *buffer,
                                 int64_t bytes, int64_t start,
                                 int num_threads, const int32_t *cpus, double seconds)
    int ktk_roof_touch(uint8_t *buffer, int64_t bytes, int num_threads, const int32_t *cpus)
