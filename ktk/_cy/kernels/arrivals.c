/* Experts that come and go while rows are decoded, without Python: a call's experts are looked up,
 * those on the disk take slots that were offered for them before, and threads here read them. Who
 * keeps the books (ktk/placement/residency/slots.py) is told by events, later, and offers new
 * slots, so that a policy in Python is never waited for. What this cannot do at once it leaves to
 * Python.
 *
 * One lock for all. An expert has its place in the tables before its read begins, and a thread that
 * reads waits for no call: an operator that waits for it (ktk_await) comes to an end. */
#define _GNU_SOURCE /* pread */
#include "ktk_arrivals.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    MAX_OFFERS = 128,
    LOW_OFFERS = 24,  /* below: more are asked for */
    LEFT_OFFERS = 8,  /* that reads ahead leave to calls */
    MAX_AHEAD = 4,    /* that are read ahead or wait for it */
    EVENTS = 1 << 15, /* words */
    MANY_EVENTS = 1 << 12,
    MAX_READERS = 16,
    AHEAD_AT_ONCE = 2,
    PIECE = 1 << 19, /* bytes of a read ahead, which can end behind each */
    BLOCK = 4096     /* O_DIRECT: what is read begins at a multiple */
};

typedef struct {
    int32_t key, slot;
} offer;

typedef struct {
    int32_t keys[MAX_AHEAD], num;
} foretold_keys;

struct ktk_arrivals {
    pthread_mutex_t lock;
    pthread_cond_t work, news;
    pthread_t threads[MAX_READERS];
    int num_layers, num_experts, num_readers, num_started, is_on, is_stopped, has_news, num_asking;
    uint8_t *memory, *standing;
    const uint8_t *checked;
    int64_t slot_bytes;
    ktk_streamed_layer *layers;
    int32_t *slot_of; /* of keys that are OURS */
    uint32_t *seen, pass;
    uint8_t *is_offered;
    _Atomic uint8_t *is_unwanted; /* of keys that are read ahead: the call came without them */
    offer offers[MAX_OFFERS];
    int num_offers;
    int32_t *wanted; /* keys to read, from first on, round */
    int first_wanted, num_wanted, running, running_ahead;
    int32_t ahead[MAX_AHEAD]; /* keys to read while nothing is wanted */
    int num_ahead;
    foretold_keys *foretold; /* of each layer, until its next call */
    int32_t *events, *told;
    int64_t num_events;
};

static int num_keys(const ktk_arrivals *a) { return a->num_layers * a->num_experts; }

ktk_arrivals *ktk_arrivals_new(int num_layers, int num_experts, uint8_t *memory, int64_t slot_bytes,
                               uint8_t *standing, const uint8_t *checked, int num_readers) {
    ktk_arrivals *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    const size_t keys = (size_t)num_layers * (size_t)num_experts;
    a->num_layers = num_layers;
    a->num_experts = num_experts;
    a->memory = memory;
    a->slot_bytes = slot_bytes;
    a->standing = standing;
    a->checked = checked;
    a->num_readers = num_readers < MAX_READERS ? num_readers : MAX_READERS;
    pthread_mutex_init(&a->lock, NULL);
    pthread_cond_init(&a->work, NULL);
    pthread_cond_init(&a->news, NULL);
    a->layers = calloc((size_t)num_layers, sizeof *a->layers);
    a->slot_of = calloc(keys, sizeof *a->slot_of);
    a->seen = calloc(keys, sizeof *a->seen);
    a->is_offered = calloc(keys, 1);
    a->is_unwanted = calloc(keys, 1);
    a->wanted = calloc(keys, sizeof *a->wanted);
    a->foretold = calloc((size_t)num_layers, sizeof *a->foretold);
    a->events = malloc(EVENTS * sizeof *a->events);
    a->told = malloc(EVENTS * sizeof *a->told);
    if (!a->layers || !a->slot_of || !a->seen || !a->is_offered || !a->is_unwanted || !a->wanted ||
        !a->foretold || !a->events || !a->told) {
        ktk_arrivals_free(a);
        return NULL;
    }
    return a;
}

void ktk_arrivals_free(ktk_arrivals *a) {
    if (!a) return;
    pthread_mutex_destroy(&a->lock);
    pthread_cond_destroy(&a->work);
    pthread_cond_destroy(&a->news);
    free(a->layers);
    free(a->slot_of);
    free(a->seen);
    free(a->is_offered);
    free(a->is_unwanted);
    free(a->wanted);
    free(a->foretold);
    free(a->events);
    free(a->told);
    free(a);
}

void ktk_arrivals_lock(ktk_arrivals *a) { pthread_mutex_lock(&a->lock); }
void ktk_arrivals_unlock(ktk_arrivals *a) { pthread_mutex_unlock(&a->lock); }

/* --- events
 * ---------------------------------------------------------------------------------------- */

static void tell(ktk_arrivals *a, int what, int num, const int32_t *words) {
    int32_t *to = a->events + a->num_events;
    to[0] = what | num << 8;
    memcpy(to + 1, words, 4 * (size_t)num);
    a->num_events += 1 + num;
}

static void wake_books(ktk_arrivals *a) {
    a->has_news = 1;
    pthread_cond_signal(&a->news);
}

int ktk_arrivals_wait(ktk_arrivals *a) {
    pthread_mutex_lock(&a->lock);
    while (!a->has_news && !a->is_stopped) pthread_cond_wait(&a->news, &a->lock);
    a->has_news = 0;
    const int goes_on = !a->is_stopped;
    pthread_mutex_unlock(&a->lock);
    return goes_on;
}

const int32_t *ktk_arrivals_events(ktk_arrivals *a, int64_t *num) {
    int32_t *full = a->events;
    a->events = a->told;
    a->told = full;
    *num = a->num_events;
    a->num_events = 0;
    return full;
}

void ktk_arrivals_ask(ktk_arrivals *a, int change) { a->num_asking += change; }

/* --- what is offered, and the tables
 * --------------------------------------------------------------- */

void ktk_arrivals_set_layer(ktk_arrivals *a, int layer, const ktk_streamed_layer *given) {
    a->layers[layer] = *given;
}

void ktk_arrivals_turn(ktk_arrivals *a, int is_on) { a->is_on = is_on; }

int ktk_arrivals_num_offered(const ktk_arrivals *a) { return a->num_offers; }

static void put_offer(ktk_arrivals *a, int at, offer o) {
    memmove(a->offers + at + 1, a->offers + at, sizeof(offer) * (size_t)(a->num_offers - at));
    a->offers[at] = o;
    a->num_offers++;
    if (o.key >= 0) a->is_offered[o.key] = 1;
}

static offer take_offer(ktk_arrivals *a, int at) {
    const offer o = a->offers[at];
    a->num_offers--;
    memmove(a->offers + at, a->offers + at + 1, sizeof(offer) * (size_t)(a->num_offers - at));
    if (o.key >= 0) a->is_offered[o.key] = 0;
    return o;
}

int ktk_arrivals_offer(ktk_arrivals *a, int32_t key, int32_t slot) {
    /* Slots of reads that are cancelled come back. */
    if (a->num_offers >= MAX_OFFERS - MAX_AHEAD) return 0;
    put_offer(a, a->num_offers, (offer){key, slot});
    return 1;
}

int ktk_arrivals_take(ktk_arrivals *a, int32_t *key, int32_t *slot) {
    if (!a->num_offers) return 0;
    const offer o = take_offer(a, 0);
    *key = o.key;
    *slot = o.slot;
    return 1;
}

int ktk_arrivals_keep(ktk_arrivals *a, int32_t key) {
    if (!a->is_offered[key]) return 0;
    int at = 0;
    while (a->offers[at].key != key) at++;
    take_offer(a, at);
    return 1;
}

/* slot -1: nowhere. */
static void put(ktk_arrivals *a, int32_t key, int32_t slot) {
    const ktk_streamed_layer *l = &a->layers[key / a->num_experts];
    const int32_t expert = key % a->num_experts;
    const uint8_t *span = a->memory + slot * a->slot_bytes;
    for (int i = 0; i < l->num_tables; i++)
        ktk_put_address(l->layer, l->entries + (int64_t)i * l->layer->num_experts + expert,
                        slot < 0 ? NULL : span + l->offsets[i]);
}

static void claim(ktk_arrivals *a, int what, int32_t key) {
    const offer o = take_offer(a, 0);
    if (o.key >= 0) {
        put(a, o.key, -1);
        a->standing[o.key] = KTK_COLD;
    }
    a->slot_of[key] = o.slot;
    a->standing[key] = KTK_OURS;
    ktk_set_arrival(a->layers[key / a->num_experts].layer, key % a->num_experts, KTK_COMING);
    put(a, key, o.slot);
    tell(a, what, 3, (const int32_t[]){key, o.slot, o.key});
}

/* --- reads
 * ----------------------------------------------------------------------------------------- */

static void want(ktk_arrivals *a, int32_t key) {
    a->wanted[(a->first_wanted + a->num_wanted++) % num_keys(a)] = key;
}

static int remove_ahead(ktk_arrivals *a, int32_t key) {
    for (int i = 0; i < a->num_ahead; i++) {
        if (a->ahead[i] != key) continue;
        a->num_ahead--;
        memmove(a->ahead + i, a->ahead + i + 1, 4 * (size_t)(a->num_ahead - i));
        return 1;
    }
    return 0;
}

void ktk_arrivals_hurry(ktk_arrivals *a, int32_t key) {
    foretold_keys *f = &a->foretold[key / a->num_experts];
    for (int i = 0; i < f->num; i++)
        if (f->keys[i] == key) f->keys[i] = f->keys[--f->num];
    atomic_store(&a->is_unwanted[key], 0);
    if (!remove_ahead(a, key)) return;
    want(a, key);
    pthread_cond_signal(&a->work);
}

/* The next to read, or -1; *is_ahead: no call waits for it. */
static int32_t next_read(ktk_arrivals *a, int *is_ahead) {
    *is_ahead = !a->num_wanted;
    if (a->num_wanted) {
        const int32_t key = a->wanted[a->first_wanted];
        a->first_wanted = (a->first_wanted + 1) % num_keys(a);
        a->num_wanted--;
        return key;
    }
    if (!a->num_ahead || (!a->is_stopped && (a->running || a->running_ahead >= AHEAD_AT_ONCE)))
        return -1;
    const int32_t key = a->ahead[0];
    remove_ahead(a, key);
    return key;
}

/* Goes on with a read from *done on, at the last whole block, where one stopped short. piece: bytes
 * at a time. Whether it may go on: all is there, or nobody wants it any more. */
static int read_more(const ktk_streamed_layer *l, int32_t expert, uint8_t *span, int64_t piece,
                     const _Atomic uint8_t *is_unwanted, int64_t *done) {
    while (*done < l->num_bytes && !atomic_load(is_unwanted)) {
        const int64_t at = *done / BLOCK * BLOCK, left = l->num_bytes - at;
        const int64_t count = pread(l->fd, span + at, (size_t)(left < piece ? left : piece),
                                    l->first + expert * l->num_bytes + at);
        if (count < 0 && errno == EINTR) continue;
        if (at + count <= *done) return 0; /* Python tries again, and knows what to say */
        *done = at + count;
    }
    return 1;
}

/* An expert that was foretold is not read: its slot is for the next. */
static void cancel(ktk_arrivals *a, int32_t key) {
    const int32_t slot = a->slot_of[key];
    put(a, key, -1);
    ktk_set_arrival(a->layers[key / a->num_experts].layer, key % a->num_experts, KTK_HERE);
    a->standing[key] = KTK_COLD;
    atomic_store(&a->is_unwanted[key], 0);
    put_offer(a, 0, (offer){-1, slot});
    tell(a, KTK_CANCELLED, 2, (const int32_t[]){key, slot});
}

/* By a thread that reads, which lets go of the lock meanwhile. */
static void read_one(ktk_arrivals *a, int32_t key, int is_ahead) {
    uint8_t *span = a->memory + a->slot_of[key] * a->slot_bytes;
    const ktk_streamed_layer *l = &a->layers[key / a->num_experts];
    const int32_t expert = key % a->num_experts;
    int64_t done = 0;
    int is_read = 1;
    while (is_read && done < l->num_bytes) {
        pthread_mutex_unlock(&a->lock);
        is_read = read_more(l, expert, span, is_ahead ? PIECE : l->num_bytes, &a->is_unwanted[key],
                            &done);
        if (is_read && done == l->num_bytes) ktk_set_arrival(l->layer, expert, KTK_HERE);
        pthread_mutex_lock(&a->lock);
        if (done < l->num_bytes && atomic_load(&a->is_unwanted[key])) {
            cancel(a, key);
            return;
        }
    }
    atomic_store(&a->is_unwanted[key], 0);
    a->standing[key] = is_read ? KTK_READY : KTK_OTHERS;
    tell(a, is_read ? KTK_CAME : KTK_FAILED, 1, &key);
    if (!is_read) wake_books(a);
}

static void *read_on(void *context) {
    ktk_arrivals *a = context;
    pthread_mutex_lock(&a->lock);
    for (;;) {
        int is_ahead;
        const int32_t key = next_read(a, &is_ahead);
        if (key < 0) {
            if (a->is_stopped) break;
            pthread_cond_wait(&a->work, &a->lock);
            continue;
        }
        int *running = is_ahead ? &a->running_ahead : &a->running;
        ++*running;
        read_one(a, key, is_ahead);
        --*running;
        if (a->num_asking) wake_books(a);
        if (a->num_ahead && !a->running) pthread_cond_signal(&a->work);
    }
    pthread_mutex_unlock(&a->lock);
    return NULL;
}

int ktk_arrivals_start(ktk_arrivals *a) {
    pthread_cond_init(&a->work, NULL); /* a forked child has the parent's, as they were */
    pthread_cond_init(&a->news, NULL);
    a->is_stopped = a->has_news = a->num_asking = a->num_started = 0;
    while (a->num_started < a->num_readers &&
           !pthread_create(&a->threads[a->num_started], NULL, read_on, a))
        a->num_started++;
    return a->num_started;
}

void ktk_arrivals_stop(ktk_arrivals *a) {
    pthread_mutex_lock(&a->lock);
    a->is_stopped = 1;
    a->is_on = 0;
    pthread_cond_broadcast(&a->work);
    pthread_cond_broadcast(&a->news);
    const int num = a->num_started;
    a->num_started = 0;
    pthread_mutex_unlock(&a->lock);
    for (int i = 0; i < num; i++) pthread_join(a->threads[i], NULL);
}

/* --- a call
 * ---------------------------------------------------------------------------------------- */

static int is_new(ktk_arrivals *a, int32_t key) {
    const int is = a->seen[key] != a->pass;
    a->seen[key] = a->pass;
    return is;
}

/* Fills held with the call's keys; whether all of them can be had at once. */
static int can_bring(ktk_arrivals *a, int layer, int64_t num_ids, const int64_t *ids,
                     ktk_held *held) {
    if (!a->is_on || held->arrivals || a->num_events > EVENTS / 2) return 0;
    int num = 0, missing = 0, offered = 0;
    a->pass++;
    for (int64_t i = 0; i < num_ids; i++) {
        const int32_t key = layer * a->num_experts + (int32_t)ids[i];
        if (!is_new(a, key)) continue;
        if (num == KTK_MAX_HELD || a->standing[key] == KTK_OTHERS) return 0;
        if (a->standing[key] == KTK_COLD) {
            if (!a->checked[key]) return 0;
            missing++;
        }
        offered += a->is_offered[key];
        held->keys[num++] = key;
    }
    held->num_keys = num;
    return missing <= a->num_offers - offered;
}

/* What was foretold of this layer and is not used is not read, or not read on. */
static void end_foretold(ktk_arrivals *a, int layer) {
    foretold_keys *f = &a->foretold[layer];
    for (int i = 0; i < f->num; i++) {
        const int32_t key = f->keys[i];
        if (a->seen[key] == a->pass || a->standing[key] != KTK_OURS) continue;
        if (remove_ahead(a, key))
            cancel(a, key);
        else
            atomic_store(&a->is_unwanted[key], 1);
    }
    f->num = 0;
}

static void foresee(ktk_arrivals *a, int layer, int64_t num, const int64_t *experts) {
    foretold_keys *f = &a->foretold[layer];
    for (int64_t i = 0; i < num; i++) {
        const int32_t key = layer * a->num_experts + (int32_t)experts[i];
        if (a->num_ahead + a->running_ahead >= MAX_AHEAD || a->num_offers <= LEFT_OFFERS) return;
        if (f->num == MAX_AHEAD || a->standing[key] != KTK_COLD || !a->checked[key]) continue;
        claim(a, KTK_FORETOLD, key);
        f->keys[f->num++] = key;
        a->ahead[a->num_ahead++] = key;
    }
}

int ktk_arrivals_bring(ktk_arrivals *a, int layer, int64_t num_ids, const int64_t *ids,
                       int64_t num_foretold, const int64_t *foretold, ktk_held *held) {
    pthread_mutex_lock(&a->lock);
    if (!can_bring(a, layer, num_ids, ids, held)) {
        wake_books(a);
        pthread_mutex_unlock(&a->lock);
        return 0;
    }
    held->arrivals = a;
    for (int i = 0; i < held->num_keys; i++)
        if (ktk_arrivals_keep(a, held->keys[i])) tell(a, KTK_SAVED, 1, &held->keys[i]);
    end_foretold(a, layer);
    int32_t words[KTK_MAX_HELD + 1] = {layer};
    memcpy(words + 1, held->keys, 4 * (size_t)held->num_keys);
    tell(a, KTK_BROUGHT, 1 + held->num_keys, words);
    for (int i = 0; i < held->num_keys; i++) {
        const int32_t key = held->keys[i];
        if (a->standing[key] == KTK_COLD) {
            claim(a, KTK_CLAIMED, key);
            want(a, key);
        } else if (a->standing[key] == KTK_OURS) {
            atomic_store(&a->is_unwanted[key], 0);
            if (remove_ahead(a, key)) want(a, key);
        }
    }
    if (num_foretold) foresee(a, layer + 1, num_foretold, foretold);
    if (a->num_wanted || a->num_ahead) pthread_cond_broadcast(&a->work);
    if (a->num_asking || a->num_offers < LOW_OFFERS || a->num_events > MANY_EVENTS) wake_books(a);
    pthread_mutex_unlock(&a->lock);
    return 1;
}

void ktk_arrivals_release(ktk_held *held) {
    ktk_arrivals *a = held->arrivals;
    if (!a) return;
    held->arrivals = NULL;
    pthread_mutex_lock(&a->lock);
    tell(a, KTK_RELEASED, held->num_keys, held->keys);
    if (a->num_asking) wake_books(a);
    pthread_mutex_unlock(&a->lock);
}
