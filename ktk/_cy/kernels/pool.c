/* Thread pool: one run at a time, tasks handed out by an atomic counter a part, spin then sleep.
 *
 * ticket = epoch << 32 | OPEN | workers inside. A worker enters an open run by raising the count
 * with a compare-and-swap, so the pool waits for no worker that has not woken (a task may: moe.c);
 * closing it and seeing zero ends it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ktk.h"

static const uint64_t OPEN = UINT64_C(1) << 31, COUNT = (UINT64_C(1) << 31) - 1;
/* Pauses before a worker sleeps, about 40 us on Zen 4; and 0.5 ms where the next call is near: a
 * model computes a little in Python from one to the other. */
enum { SPINS = 2000, SPINS_IN_PASS = 30000 };

typedef struct {
    ktk_pool *pool;
    int index;
} worker;

typedef struct {
    _Alignas(64) _Atomic int64_t next;
    int64_t end;
} task_list;

struct ktk_pool {
    _Alignas(64) _Atomic uint64_t ticket;
    task_list lists[KTK_MAX_PARTS];
    _Alignas(64) ktk_task_fn *fn;
    void *context;
    int num_lists;
    _Atomic int sleepers, stop, arrivals, spins;
    pthread_mutex_t sleep_lock, operator_lock;
    pthread_cond_t wake;
    int num_threads, num_parts, may_borrow;
    pthread_t *threads;
    worker *workers;
    cpu_set_t *cores; /* of each thread, NULL: not pinned */
    void *scratch;
    int64_t scratch_size;
};

/* Another OpenMP runtime's threads may stand on the cores already: torch's spin for milliseconds
 * after each of its regions, and workers beside them get part of a core. Its GOMP_parallel then
 * runs the tasks on those very threads: prefill of a whole small model is 26-29 % faster so
 * (bench/RESULTS.md). */
typedef void parallel_fn(void (*body)(void *), void *context, unsigned num_threads, unsigned flags);
static _Atomic(parallel_fn *) borrowed_parallel;
static _Thread_local int is_own_only;

static void forget_borrowed(void) {
    atomic_store(&borrowed_parallel, NULL);
} /* a child has not those threads */

void ktk_pool_borrow(void *gomp_parallel) {
    static atomic_flag is_registered = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&is_registered)) pthread_atfork(NULL, NULL, forget_borrowed);
    parallel_fn *parallel;
    memcpy(&parallel, &gomp_parallel, sizeof parallel);
    atomic_store(&borrowed_parallel, parallel);
}

int ktk_pool_own_threads_only(int is_only) {
    int before = is_own_only;
    is_own_only = is_only;
    return before;
}

/* The caller may have set flush-to-zero (torch.set_flush_denormal, -ffast-math libraries); workers
 * have not. All tasks run with IEEE rounding and denormals, so that it does not matter which thread
 * takes which. */
unsigned ktk_float_mode_enter(void) {
#if defined(__x86_64__)
    unsigned callers = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
    return callers;
#else
    return 0;
#endif
}

void ktk_float_mode_leave(unsigned callers) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(callers);
#else
    (void)callers;
#endif
}

static int part_of(const ktk_pool *pool, int thread) {
    return thread * pool->num_parts / pool->num_threads;
}

/* The part's own list, then what the others have left. */
static void run_tasks(ktk_pool *pool, int thread) {
    unsigned callers = ktk_float_mode_enter();
    for (int i = 0; i < pool->num_lists; i++) {
        task_list *list = &pool->lists[(part_of(pool, thread) + i) % pool->num_lists];
        for (;;) {
            int64_t task = atomic_fetch_add_explicit(&list->next, 1, memory_order_relaxed);
            if (task >= list->end) break;
            pool->fn(pool->context, task, thread);
        }
    }
    ktk_float_mode_leave(callers);
}

static void run_borrowed(void *context) {
    ktk_pool *pool = context;
    run_tasks(pool, atomic_fetch_add(&pool->arrivals, 1));
}

static int is_open_for(uint64_t ticket, uint64_t seen) {
    return (ticket & OPEN) && ticket >> 32 != seen;
}

static void *work(void *argument) {
    worker *self = argument;
    ktk_pool *pool = self->pool;
    pthread_setname_np(pthread_self(), "ktk-worker");
    uint64_t seen = 0;
    int spins = 0;
    while (!atomic_load(&pool->stop)) {
        uint64_t ticket = atomic_load(&pool->ticket);
        if (is_open_for(ticket, seen)) {
            if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1)) continue;
            seen = ticket >> 32;
            run_tasks(pool, self->index);
            atomic_fetch_sub(&pool->ticket, 1);
            spins = 0;
        } else if (++spins < atomic_load_explicit(&pool->spins, memory_order_relaxed)) {
            KTK_PAUSE();
        } else {
            pthread_mutex_lock(&pool->sleep_lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!atomic_load(&pool->stop) && !is_open_for(atomic_load(&pool->ticket), seen))
                pthread_cond_wait(&pool->wake, &pool->sleep_lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->sleep_lock);
            spins = 0;
        }
    }
    return NULL;
}

static void wake_all(ktk_pool *pool) {
    if (atomic_load(&pool->sleepers) == 0) return;
    pthread_mutex_lock(&pool->sleep_lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
}

ktk_pool *ktk_pool_new(int num_threads, int num_parts, const void *cores, int may_borrow) {
    ktk_pool *pool = aligned_alloc(64, (sizeof(ktk_pool) + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (ktk_pool){.num_threads = 1, .num_parts = num_parts, .may_borrow = may_borrow};
    pthread_mutex_init(&pool->sleep_lock, NULL);
    pthread_mutex_init(&pool->operator_lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = calloc((size_t)num_threads, sizeof(pthread_t));
    pool->workers = calloc((size_t)num_threads, sizeof(worker));
    if (cores) pool->cores = malloc((size_t)num_threads * sizeof(cpu_set_t));
    if (!pool->threads || !pool->workers || (cores && !pool->cores)) {
        ktk_pool_free(pool);
        return NULL;
    }
    if (cores) memcpy(pool->cores, cores, (size_t)num_threads * sizeof(cpu_set_t));
    for (int i = 1; i < num_threads; i++) {
        pool->workers[i] = (worker){pool, i};
        if (pthread_create(&pool->threads[i], NULL, work, &pool->workers[i])) {
            ktk_pool_free(pool);
            return NULL;
        }
        pool->num_threads = i + 1;
        if (cores) pthread_setaffinity_np(pool->threads[i], sizeof(cpu_set_t), &pool->cores[i]);
    }
    return pool;
}

void ktk_pool_free(ktk_pool *pool) {
    atomic_store(&pool->stop, 1);
    pthread_mutex_lock(&pool->sleep_lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->sleep_lock);
    pthread_mutex_destroy(&pool->operator_lock);
    pthread_cond_destroy(&pool->wake);
    free(pool->threads);
    free(pool->workers);
    free(pool->cores);
    free(pool->scratch);
    free(pool);
}

int ktk_pool_num_threads(const ktk_pool *pool) { return pool->num_threads; }

/* The caller works too, wherever the OS has put it: the worker pinned to that core, if there is
 * one, takes the core kept for the caller. A pool of several parts needs its caller in the first:
 * callers_cpus then gets what to restore. */
static int place_caller(ktk_pool *pool, cpu_set_t *callers_cpus) {
    int cpu = sched_getcpu(), first_part = 1;
    if (cpu < 0 || CPU_ISSET(cpu, &pool->cores[0])) return 0;
    while (first_part < pool->num_threads && part_of(pool, first_part) == 0) first_part++;
    for (int i = 1; i < first_part; i++)
        if (CPU_ISSET(cpu, &pool->cores[i])) {
            cpu_set_t own = pool->cores[i];
            pool->cores[i] = pool->cores[0];
            pool->cores[0] = own;
            pthread_setaffinity_np(pool->threads[i], sizeof(cpu_set_t), &pool->cores[i]);
            return 0;
        }
    if (pool->num_parts == 1 ||
        pthread_getaffinity_np(pthread_self(), sizeof *callers_cpus, callers_cpus))
        return 0;
    return pthread_setaffinity_np(pthread_self(), sizeof(cpu_set_t), &pool->cores[0]) == 0;
}

void ktk_pool_run(ktk_pool *pool, ktk_task_fn *fn, void *context, const int64_t *begin,
                  int num_lists) {
    int64_t num_tasks = begin[num_lists] - begin[0];
    pool->fn = fn;
    pool->context = context;
    pool->num_lists = num_lists;
    atomic_store_explicit(&pool->spins, is_own_only == 2 ? SPINS_IN_PASS : SPINS,
                          memory_order_relaxed);
    for (int i = 0; i < num_lists; i++) {
        pool->lists[i].end = begin[i + 1];
        atomic_store_explicit(&pool->lists[i].next, begin[i], memory_order_relaxed);
    }
    if (num_tasks == 1 || pool->num_threads == 1) {
        run_tasks(pool, 0);
        return;
    }
    parallel_fn *parallel =
        is_own_only || !pool->may_borrow ? NULL : atomic_load(&borrowed_parallel);
    if (parallel) {
        atomic_store(&pool->arrivals, 0);
        parallel(run_borrowed, pool, (unsigned)pool->num_threads, 0);
        return;
    }
    cpu_set_t callers_cpus;
    int is_moved = pool->cores ? place_caller(pool, &callers_cpus) : 0;
    uint64_t epoch = (atomic_load(&pool->ticket) >> 32) + 1;
    if ((uint32_t)epoch == 0) epoch = 1; /* 0 is what a new worker has seen */
    atomic_store(&pool->ticket, epoch << 32 | OPEN);
    wake_all(pool);
    run_tasks(pool, 0);
    atomic_fetch_and(&pool->ticket, ~OPEN);
    for (int spins = 0; atomic_load(&pool->ticket) & COUNT; spins++) {
        if (spins < SPINS)
            KTK_PAUSE();
        else
            sched_yield();
    }
    if (is_moved) pthread_setaffinity_np(pthread_self(), sizeof callers_cpus, &callers_cpus);
}

void ktk_pool_lock(ktk_pool *pool) { pthread_mutex_lock(&pool->operator_lock); }
void ktk_pool_unlock(ktk_pool *pool) { pthread_mutex_unlock(&pool->operator_lock); }

void *ktk_pool_scratch(ktk_pool *pool, int64_t size) {
    if (size > pool->scratch_size) {
        const size_t huge = 2 << 20, unit = size < (int64_t)huge ? 4096 : huge;
        const size_t bytes = ((size_t)size + unit - 1) / unit * unit;
        free(pool->scratch);
        pool->scratch = aligned_alloc(unit, bytes);
        pool->scratch_size = pool->scratch ? (int64_t)bytes : 0;
        if (pool->scratch && unit == huge) madvise(pool->scratch, bytes, MADV_HUGEPAGE);
    }
    return pool->scratch;
}
