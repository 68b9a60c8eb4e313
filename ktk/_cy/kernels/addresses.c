/* Where experts are: the tables of a layer, which change between calls of the operator; and whether
 * their bytes are there yet, which changes while it runs. */
#define _GNU_SOURCE /* pthread_rwlock_t */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "moe.h"

enum { SPINS = 200 }; /* pauses before a thread sleeps: a read takes longer */

struct ktk_lock {
    pthread_rwlock_t rw;
    pthread_mutex_t sleep;
    pthread_cond_t changed;
    _Atomic uint8_t arrivals[]; /* ktk_arrival of each expert */
};

struct ktk_lock *ktk_lock_new(int num_experts) {
    struct ktk_lock *lock = calloc(1, sizeof *lock + (size_t)num_experts);
    if (!lock) return NULL;
    pthread_rwlock_init(&lock->rw, NULL);
    pthread_mutex_init(&lock->sleep, NULL);
    pthread_cond_init(&lock->changed, NULL);
    return lock;
}

void ktk_lock_free(struct ktk_lock *lock) {
    if (!lock) return;
    pthread_rwlock_destroy(&lock->rw);
    pthread_mutex_destroy(&lock->sleep);
    pthread_cond_destroy(&lock->changed);
    free(lock);
}

int ktk_arrival_of(const ktk_layer *layer, int64_t expert) {
    return atomic_load_explicit(&layer->lock->arrivals[expert], memory_order_acquire);
}

void ktk_set_arrival(ktk_layer *layer, int64_t expert, int arrival) {
    struct ktk_lock *lock = layer->lock;
    pthread_mutex_lock(&lock->sleep);
    atomic_store_explicit(&lock->arrivals[expert], (uint8_t)arrival, memory_order_release);
    pthread_cond_broadcast(&lock->changed);
    pthread_mutex_unlock(&lock->sleep);
}

int ktk_await(const ktk_layer *layer, int64_t expert) {
    struct ktk_lock *lock = layer->lock;
    for (int i = 0; i < SPINS && ktk_arrival_of(layer, expert) == KTK_COMING; i++) KTK_PAUSE();
    if (ktk_arrival_of(layer, expert) == KTK_COMING) {
        pthread_mutex_lock(&lock->sleep);
        while (ktk_arrival_of(layer, expert) == KTK_COMING)
            pthread_cond_wait(&lock->changed, &lock->sleep);
        pthread_mutex_unlock(&lock->sleep);
    }
    return ktk_arrival_of(layer, expert);
}

/* An operator's: the layer's tables stay as they are. */
void ktk_lock_to_read(const ktk_layer *layer) { pthread_rwlock_rdlock(&layer->lock->rw); }

void ktk_unlock(const ktk_layer *layer) { pthread_rwlock_unlock(&layer->lock->rw); }

void ktk_set_address(ktk_layer *layer, const void **entry, const void *address) {
    pthread_rwlock_wrlock(&layer->lock->rw);
    ktk_put_address(layer, entry, address);
    pthread_rwlock_unlock(&layer->lock->rw);
}

void ktk_put_address(ktk_layer *layer, const void **entry, const void *address) {
    layer->num_absent += (address == NULL) - (*entry == NULL);
    *entry = address;
}

int ktk_is_absent(const ktk_layer *layer, int64_t e) {
    for (int p = 0; p < layer->num_parts; p++) {
        const ktk_part *part = &layer->parts[p];
        if (!part->gate_up[e] || !part->down[e] || (part->up && !part->up[e])) return 1;
        if ((part->gate_bias && !part->gate_bias[e]) || (part->up_bias && !part->up_bias[e]) ||
            (part->down_bias && !part->down_bias[e]))
            return 1;
    }
    return 0;
}

int ktk_has_all(const ktk_layer *layer, int64_t num_ids, const int64_t *ids, const uint8_t *skip) {
    for (int64_t i = 0; layer->num_absent && i < num_ids; i++) {
        const int64_t e = ids[i];
        if (e >= 0 && e < layer->num_experts && !(skip && skip[e]) && ktk_is_absent(layer, e))
            return 0;
    }
    return 1;
}
