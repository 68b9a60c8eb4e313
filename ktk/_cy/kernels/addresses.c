/* Where experts are: the tables of a layer, which change between calls of the operator. */
#define _GNU_SOURCE /* pthread_rwlock_t */
#include <pthread.h>
#include <stdlib.h>

#include "moe.h"

struct ktk_lock {
    pthread_rwlock_t rw;
};

struct ktk_lock *ktk_lock_new(void) {
    struct ktk_lock *lock = malloc(sizeof *lock);
    if (lock) pthread_rwlock_init(&lock->rw, NULL);
    return lock;
}

void ktk_lock_free(struct ktk_lock *lock) {
    if (lock) pthread_rwlock_destroy(&lock->rw);
    free(lock);
}

/* An operator's: the layer's tables stay as they are. */
void ktk_lock_to_read(const ktk_layer *layer) { pthread_rwlock_rdlock(&layer->lock->rw); }

void ktk_unlock(const ktk_layer *layer) { pthread_rwlock_unlock(&layer->lock->rw); }

void ktk_set_address(ktk_layer *layer, const void **entry, const void *address) {
    pthread_rwlock_wrlock(&layer->lock->rw);
    layer->num_absent += (address == NULL) - (*entry == NULL);
    *entry = address;
    pthread_rwlock_unlock(&layer->lock->rw);
}

static int is_absent(const ktk_layer *layer, int64_t e) {
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
        if (e >= 0 && e < layer->num_experts && !(skip && skip[e]) && is_absent(layer, e)) return 0;
    }
    return 1;
}
