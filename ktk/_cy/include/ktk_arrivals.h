/* Experts that come and go while rows are decoded: which are in memory, who leaves for another, and
 * the threads that read. */
#ifndef KTK_ARRIVALS_H
#define KTK_ARRIVALS_H

#include "ktk.h"

/* Where an expert's bytes stand. COLD: on the disk. READY: in memory. OURS: a thread here reads
 * them. OTHERS: something else is done with them, which is no business of this. */
enum ktk_standing { KTK_COLD, KTK_READY, KTK_OURS, KTK_OTHERS };

/* What happened, in its order: a word (what | number of words << 8), and the words. BROUGHT: a call
 * of a layer has its experts: layer, keys. RELEASED: keys. CAME, FAILED: key. CLAIMED, FORETOLD:
 * key, slot, who left for it or -1. SAVED: the key was to leave next and does not. CANCELLED: key,
 * slot; it was FORETOLD, and is not read. */
enum ktk_event {
    KTK_BROUGHT,
    KTK_RELEASED,
    KTK_CAME,
    KTK_FAILED,
    KTK_CLAIMED,
    KTK_FORETOLD,
    KTK_SAVED,
    KTK_CANCELLED
};

/* A layer's tables, one behind the other, an entry for each expert; of each where its bytes are in
 * a slot; and the file that has the experts one behind the other from `first` on. */
enum { KTK_MAX_TABLES = 6 };
typedef struct {
    ktk_layer *layer;
    const void **entries;
    int32_t num_tables, fd;
    int64_t offsets[KTK_MAX_TABLES], first, num_bytes;
} ktk_streamed_layer;

typedef struct ktk_arrivals ktk_arrivals;

/* memory: of the slots. An expert's key is layer * num_experts + expert. standing: of each key a
 * ktk_standing; the caller writes to it, with the lock. checked: of each key, whether its bytes
 * were looked at before, so that they may be run. NULL: no memory. */
ktk_arrivals *ktk_arrivals_new(int num_layers, int num_experts, uint8_t *memory, int64_t slot_bytes,
                               uint8_t *standing, const uint8_t *checked, int num_readers);
void ktk_arrivals_free(ktk_arrivals *a);
/* Threads begin, in the process that calls; 0 if they cannot. They end after what they read. */
int ktk_arrivals_start(ktk_arrivals *a);
void ktk_arrivals_stop(ktk_arrivals *a);

void ktk_arrivals_lock(ktk_arrivals *a);
void ktk_arrivals_unlock(ktk_arrivals *a);
/* Until there is something to do for who keeps the books; 0: stopped. Without the lock. */
int ktk_arrivals_wait(ktk_arrivals *a);

/* With the lock: */
void ktk_arrivals_set_layer(ktk_arrivals *a, int layer, const ktk_streamed_layer *given);
void ktk_arrivals_turn(ktk_arrivals *a, int is_on); /* whether ktk_arrivals_bring does anything */
void ktk_arrivals_ask(ktk_arrivals *a, int change); /* +1, -1: someone waits for events */
/* A slot for who comes next: key's, which is READY and leaves then; or, -1, an empty one. */
int ktk_arrivals_offer(ktk_arrivals *a, int32_t key, int32_t slot); /* 0: no room for it */
/* The first one back, or 0; *key as it was given. */
int ktk_arrivals_take(ktk_arrivals *a, int32_t *key, int32_t *slot);
int ktk_arrivals_keep(ktk_arrivals *a, int32_t key); /* it is offered no more; 0: it was not */
int ktk_arrivals_num_offered(const ktk_arrivals *a);
void ktk_arrivals_hurry(ktk_arrivals *a, int32_t key); /* a call waits for it, if it is OURS */
/* Events since the last time, num words; they stay until the next call with the lock. */
const int32_t *ktk_arrivals_events(ktk_arrivals *a, int64_t *num);

/* The keys that a call has. arrivals NULL: none. */
enum { KTK_MAX_HELD = 256 };
typedef struct {
    ktk_arrivals *arrivals;
    int32_t num_keys, keys[KTK_MAX_HELD];
} ktk_held;

/* Without the lock: puts the experts of ids where the layer's tables say, and begins to read those
 * that are not in memory, and of foretold, the next layer's, some. Whether it could; else nothing
 * changes. */
int ktk_arrivals_bring(ktk_arrivals *a, int layer, int64_t num_ids, const int64_t *ids,
                       int64_t num_foretold, const int64_t *foretold, ktk_held *held);
void ktk_arrivals_release(ktk_held *held);

#endif
