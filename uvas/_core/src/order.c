/* order.c: blocks of an arena in the order of streams (uvas.h has the contract).
 *
 * What is known of a block stands in a *note*. A note is in one of two tables: by the block's address while it is handed out, by stream and size while
 * it is kept. Sizes are rounded up to 8 steps for each doubling, so that a kept block fits the next request of about that size. The tables have a fixed
 * number of chains, made at open; the lock is held for a few loads and stores, never over a call.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "failure.h"
#include "uvas.h"

#define LIVE_CHAINS 16384u
#define KEPT_CHAINS 4096u
#define ALIGNMENT 512u /* as CUDA aligns what it allocates, and more than any element needs */
#define STEPS_SHIFT 3u
#define PER_THREAD 2 /* CU_STREAM_PER_THREAD: one number for what is another stream in each thread */

struct lane { /* a stream as it is told apart here */
    intptr_t stream;
    uint64_t thread; /* 0, but for a stream that is its thread's own */
    int device;      /* the default stream of every device has the same number */
};

struct note {
    uintptr_t base;
    size_t size;
    struct lane lane;
    struct note *next; /* in its chain */
};

struct uvas_order {
    struct uvas_order_options options;
    pthread_mutex_t lock;
    struct uvas_order_stats stats;
    struct note *live[LIVE_CHAINS], *kept[KEPT_CHAINS];
};

static uint64_t scatter(uint64_t value) {
    value *= 0x9e3779b97f4a7c15u;
    return value ^ value >> 32;
}

static struct note **live_chain(struct uvas_order *order, uintptr_t base) {
    return &order->live[scatter(base / ALIGNMENT) % LIVE_CHAINS];
}

static struct note **kept_chain(struct uvas_order *order, struct lane lane, size_t size) {
    uint64_t mixed = scatter((uint64_t)lane.stream + lane.thread) + (unsigned)lane.device;
    return &order->kept[scatter(mixed + scatter(size)) % KEPT_CHAINS];
}

static bool same(struct lane one, struct lane other) {
    return one.stream == other.stream && one.thread == other.thread && one.device == other.device;
}

static uint64_t this_thread(void) { /* never used again, as what a thread's stream has run is not known when the thread has ended */
    static atomic_uint_least64_t last; /* any thread adds to it, relaxed: no other memory goes with a number */
    static _Thread_local uint64_t mine;
    if (!mine) {
        mine = atomic_fetch_add_explicit(&last, 1, memory_order_relaxed) + 1;
    }
    return mine;
}

static struct lane current_lane(const struct uvas_order *order, int device) {
    intptr_t stream = order->options.current();
    return (struct lane){.stream = stream, .thread = stream == PER_THREAD ? this_thread() : 0, .device = device};
}

/* Up to the next of 8 steps between two powers of two; 0: too large. */
static size_t rounded(size_t size) {
    size_t unit = ALIGNMENT;
    if (size > SIZE_MAX / 2) {
        return 0;
    }
    if (size > ALIGNMENT << STEPS_SHIFT) {
        unit = (size_t)1 << (63u - (unsigned)__builtin_clzll(size - 1) - STEPS_SHIFT);
    }
    return (size + unit - 1) & ~(unit - 1);
}

int uvas_order_open(const struct uvas_order_options *options, struct uvas_order **out) {
    if (!options->current) {
        return uvas_fail_invalid("an order of streams needs to know which is current");
    }
    struct uvas_order *order = calloc(1, sizeof *order);
    if (!order) {
        return uvas_fail_memory(0, sizeof *order, "the host");
    }
    order->options = *options;
    (void)pthread_mutex_init(&order->lock, NULL);
    *out = order;
    return 0;
}

static struct note *take_kept(struct uvas_order *order, struct lane lane, size_t size) { /* under the lock */
    struct note **at = kept_chain(order, lane, size);
    while (*at && (!same((*at)->lane, lane) || (*at)->size != size)) {
        at = &(*at)->next;
    }
    struct note *found = *at;
    if (found) {
        *at = found->next;
        order->stats.kept_blocks--;
        order->stats.kept_bytes -= found->size;
    }
    return found;
}

static void hand_out(struct uvas_order *order, struct note *note) { /* under the lock */
    struct note **chain = live_chain(order, note->base);
    note->next = *chain;
    *chain = note;
    order->stats.live_blocks++;
    order->stats.live_bytes += note->size;
}

/* A new block: without waiting where that is possible; who must not wait with what he holds is asked otherwise. */
static int fresh(struct uvas_order *order, size_t size, uintptr_t *base) {
    int rc = uvas_alloc_try(order->options.arena, size, ALIGNMENT, base);
    if (rc < 0 && order->options.wait) {
        return order->options.wait(order->options.context, size, base);
    }
    return rc == -EAGAIN ? uvas_alloc(order->options.arena, size, ALIGNMENT, base) : rc;
}

void *uvas_order_malloc(void *opaque, size_t asked, int device) {
    struct uvas_order *order = opaque;
    size_t size = rounded(asked ? asked : 1);
    if (!size) {
        (void)uvas_fail_memory(0, asked, "any arena");
        return NULL;
    }
    struct lane lane = current_lane(order, device);
    (void)pthread_mutex_lock(&order->lock);
    struct note *note = take_kept(order, lane, size);
    if (note) {
        hand_out(order, note);
    }
    (void)pthread_mutex_unlock(&order->lock);
    if (note) {
        return (void *)note->base;
    }
    note = malloc(sizeof *note);
    if (!note) {
        (void)uvas_fail_memory(0, sizeof *note, "the host");
        return NULL;
    }
    *note = (struct note){.size = size, .lane = lane};
    if (fresh(order, size, &note->base) < 0) {
        free(note);
        return NULL;
    }
    (void)pthread_mutex_lock(&order->lock);
    hand_out(order, note);
    (void)pthread_mutex_unlock(&order->lock);
    return (void *)note->base;
}

void uvas_order_free(void *opaque, void *block, int device) {
    (void)device;
    struct uvas_order *order = opaque;
    uintptr_t base = (uintptr_t)block;
    (void)pthread_mutex_lock(&order->lock);
    struct note **at = live_chain(order, base);
    while (*at && (*at)->base != base) {
        at = &(*at)->next;
    }
    struct note *note = *at;
    if (note) {
        *at = note->next;
        order->stats.live_blocks--;
        order->stats.live_bytes -= note->size;
        struct note **chain = kept_chain(order, note->lane, note->size);
        note->next = *chain;
        *chain = note;
        order->stats.kept_blocks++;
        order->stats.kept_bytes += note->size;
    }
    (void)pthread_mutex_unlock(&order->lock);
}

/* Under the lock: everything that is kept, as one list. */
static struct note *take_all(struct uvas_order *order) {
    struct note *all = NULL;
    for (size_t i = 0; order->stats.kept_blocks > 0 && i < KEPT_CHAINS; i++) {
        while (order->kept[i]) {
            struct note *note = order->kept[i];
            order->kept[i] = note->next;
            note->next = all;
            all = note;
            order->stats.kept_blocks--;
        }
    }
    order->stats.kept_bytes = 0;
    return all;
}

static uint64_t give_back(struct uvas_order *order, struct note *all) {
    uint64_t bytes = 0;
    while (all) {
        struct note *note = all;
        all = note->next;
        bytes += uvas_free(order->options.arena, note->base) == 0 ? note->size : 0;
        free(note);
    }
    return bytes;
}

int uvas_order_trim(struct uvas_order *order, uint64_t *bytes) {
    (void)pthread_mutex_lock(&order->lock);
    struct note *all = take_all(order);
    (void)pthread_mutex_unlock(&order->lock);
    uint64_t given = give_back(order, all);
    if (bytes) {
        *bytes = given;
    }
    return 0;
}

int uvas_order_stats(struct uvas_order *order, struct uvas_order_stats *out) {
    (void)pthread_mutex_lock(&order->lock);
    struct uvas_order_stats stats = order->stats;
    (void)pthread_mutex_unlock(&order->lock);
    *out = stats;
    return 0;
}

int uvas_order_close(struct uvas_order *order) {
    (void)pthread_mutex_lock(&order->lock);
    bool busy = order->stats.live_blocks > 0;
    struct note *all = busy ? NULL : take_all(order);
    (void)pthread_mutex_unlock(&order->lock);
    if (busy) {
        return -EBUSY;
    }
    (void)give_back(order, all);
    (void)pthread_mutex_destroy(&order->lock);
    free(order);
    return 0;
}
