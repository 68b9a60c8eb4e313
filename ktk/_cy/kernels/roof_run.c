/* Runs the loops of roof.c on all threads at once. Compiled with baseline flags.
 *
 * A thread counts what it did until its own clock says stop: nobody waits for the slowest, and a
 * thread that lost its core shows as a lower rate. Threads live for one measurement: nothing of
 * them spins beside what is measured next. */
#define _GNU_SOURCE /* pthread_attr_setaffinity_np */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ktk_roof.h"

#define ROW(isa) extern const ktk_roof ktk_roof_##isa;
KTK_ROWS
#undef ROW
#define ROW(isa) &ktk_roof_##isa,
static const ktk_roof *const rows[] = {KTK_ROWS NULL};
#undef ROW

const ktk_roof *ktk_roof_row(int index) { return rows[index]; }

enum {
    STEPS = 1000,        /* between two looks at the clock: 5-50 us */
    PIECE = 64 << 10,    /* bytes of all streams between two looks: about 2 us */
    SKEW = 4096 + 5 * 64 /* between streams: else all lines fall into one set of L1 */
};
static const double WARM_UP = 1e-3; /* seconds until wide vectors run at full width and clock */

typedef struct {
    const ktk_roof_peak *peak;       /* one of these two, or neither: touch */
    const ktk_roof_pattern *pattern; /* */
    uint8_t *buffer;
    int64_t bytes, start;
    double seconds;
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int num_threads, num_ready, is_cancelled;
} job_t;

typedef struct {
    job_t *job;
    int index;
    double rate;
    pthread_t thread;
} worker_t;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Rate of one thread in multiply-adds or bytes per second. */
static double spend(const job_t *job, int index, double seconds) {
    double begin = now(), spent, done = 0;
    if (job->peak) {
        do {
            job->peak->run(STEPS);
            done += STEPS * job->peak->macs;
            spent = now() - begin;
        } while (spent < seconds);
        return done / spent;
    }
    const int streams = job->pattern->streams;
    const int64_t share = job->bytes / job->num_threads / 4096 * 4096, piece = PIECE / streams;
    const int64_t walk = (share / streams - SKEW) / piece * piece, stride = walk + SKEW;
    const uint8_t *first = job->buffer + index * share;
    int64_t at = job->start / piece * piece % walk;
    do {
        job->pattern->run(first + at, stride, piece);
        done += PIECE;
        at = at + piece < walk ? at + piece : 0;
        spent = now() - begin;
    } while (spent < seconds);
    return done / spent;
}

/* Wait for all threads; 0 if one of them could not be started. */
static int meet(job_t *job) {
    pthread_mutex_lock(&job->lock);
    if (++job->num_ready == job->num_threads) pthread_cond_broadcast(&job->turn);
    while (job->num_ready < job->num_threads && !job->is_cancelled)
        pthread_cond_wait(&job->turn, &job->lock);
    int all = !job->is_cancelled;
    pthread_mutex_unlock(&job->lock);
    return all;
}

static void *work(void *argument) {
    worker_t *me = argument;
    job_t *job = me->job;
    if (!job->peak && !job->pattern) {
        const int64_t share = job->bytes / job->num_threads;
        memset(job->buffer + me->index * share, 1, (size_t)share);
        return NULL;
    }
    spend(job, me->index, WARM_UP);
    if (meet(job)) me->rate = spend(job, me->index, job->seconds);
    return NULL;
}

static int start(worker_t *worker, int cpu) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return -1;
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu >= 0 && cpu < CPU_SETSIZE) {
        CPU_SET(cpu, &set);
        pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
    }
#else
    (void)cpu;
#endif
    int status = pthread_create(&worker->thread, &attributes, work, worker);
    pthread_attr_destroy(&attributes);
    return status ? -1 : 0;
}

static double run(job_t *job, int num_threads, const int32_t *cpus) {
    worker_t *workers = calloc((size_t)num_threads, sizeof *workers);
    if (!workers) return -1;
    job->num_threads = num_threads;
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->turn, NULL);
    int started = 0;
    while (started < num_threads) {
        workers[started].job = job;
        workers[started].index = started;
        if (start(&workers[started], cpus[started])) break;
        started++;
    }
    if (started < num_threads) {
        pthread_mutex_lock(&job->lock);
        job->is_cancelled = 1;
        pthread_cond_broadcast(&job->turn);
        pthread_mutex_unlock(&job->lock);
    }
    double rate = 0;
    for (int i = 0; i < started; i++) {
        pthread_join(workers[i].thread, NULL);
        rate += workers[i].rate;
    }
    pthread_cond_destroy(&job->turn);
    pthread_mutex_destroy(&job->lock);
    free(workers);
    return started < num_threads ? -1 : rate;
}

double ktk_roof_measure_peak(const ktk_roof_peak *peak, int num_threads, const int32_t *cpus,
                             double seconds) {
    job_t job = {.peak = peak, .seconds = seconds};
    return run(&job, num_threads, cpus);
}

double ktk_roof_measure_read(const ktk_roof_pattern *pattern, const uint8_t *buffer, int64_t bytes,
                             int64_t start, int num_threads, const int32_t *cpus, double seconds) {
    job_t job = {.pattern = pattern,
                 .buffer = (uint8_t *)buffer,
                 .bytes = bytes,
                 .start = start,
                 .seconds = seconds};
    return run(&job, num_threads, cpus);
}

int ktk_roof_touch(uint8_t *buffer, int64_t bytes, int num_threads, const int32_t *cpus) {
    job_t job = {.buffer = buffer, .bytes = bytes};
    return run(&job, num_threads, cpus) < 0 ? -1 : 0;
}
