/* Ceilings of the machine at this moment: multiply-adds per second of each kind of instruction, and
 * bytes per second read from memory. `ktk bench` holds the kernels against them. Stands alone: no
 * Python.h, no ktk.h. */
#ifndef KTK_ROOF_H
#define KTK_ROOF_H

#include <stdint.h>

/* One kind of instruction. */
typedef struct {
    const char *name;
    const char *needs; /* CPU features beyond those of the row, separated by spaces */
    double macs;       /* multiply-adds of one step */
    void (*run)(int64_t steps);
} ktk_roof_peak;

/* One way to walk memory: streams runs of `bytes` bytes (a multiple of 1024), `stride` bytes apart.
 */
typedef struct {
    const char *name;
    int streams;
    void (*run)(const uint8_t *first, int64_t stride, int64_t bytes);
} ktk_roof_pattern;

/* What one ISA row adds to the rows below it. */
typedef struct {
    const char *name;
    int num_peaks, num_patterns;
    const ktk_roof_peak *peaks;
    const ktk_roof_pattern *patterns;
} ktk_roof;

/* Rows of this build, slowest first; NULL past the last. */
const ktk_roof *ktk_roof_row(int index);

/* All threads start together, thread i on CPU cpus[i] (-1: wherever the system puts it), and run
 * for `seconds`. Returns the sum of their rates, or -1 if the threads cannot be started. */
double ktk_roof_measure_peak(const ktk_roof_peak *peak, int num_threads, const int32_t *cpus,
                             double seconds);

/* Bytes per second. Each thread reads its own share of `buffer`, from `start` bytes (modulo what it
 * walks) on. */
double ktk_roof_measure_read(const ktk_roof_pattern *pattern, const uint8_t *buffer, int64_t bytes,
                             int64_t start, int num_threads, const int32_t *cpus, double seconds);

/* Each thread writes its share, so that it has pages, on the thread's own NUMA node. 0, or -1 as
 * above. */
int ktk_roof_touch(uint8_t *buffer, int64_t bytes, int num_threads, const int32_t *cpus);

#endif
