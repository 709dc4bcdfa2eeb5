/* slots.h: handles. A table of records of one kind, and the 64-bit ids that name them.
 *
 *   id    0 | kind (3 bits) | generation (36 bits) | index (24 bits); never 0, never used twice: a slot whose generations are spent is not
 *         given out again
 *   memory is type-stable: a chunk of records, once made, stays; so the id in a slot may be read at any time, without a lock
 */
#ifndef UVAS_SLOTS_H
#define UVAS_SLOTS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "uvas.h"

#define UVAS_SLOTS_CHUNK 64u
#define UVAS_SLOTS_CHUNKS_MAX (1u << 18) /* times UVAS_SLOTS_CHUNK: 16,777,216 records, 24 bits of index */

enum uvas_slot_kind { UVAS_SLOT_SPACE = 0, UVAS_SLOT_RANGE = 1, UVAS_SLOT_DEVICE = 2, UVAS_SLOT_LEASE = 3, UVAS_SLOT_ARENA = 4 };

struct uvas_slot { /* the head of every record */
    _Atomic uint64_t id;  /* 0: not in use. Written under the core's lock (a lease's: see space.h); read by anyone */
    uint64_t next_id;     /* the id that this slot gets next; under the lock */
    struct uvas_slot *next; /* in the free list or in the caller's; under the lock */
};

struct uvas_slots {
    size_t record_bytes;
    uint64_t kind; /* enum uvas_slot_kind */
    _Atomic(char *) *chunks; /* UVAS_SLOTS_CHUNKS_MAX of them, NULL until made; a static array, written once under the lock */
    uint32_t made;            /* chunks; under the lock */
    uint64_t oldest_generation; /* that new chunks go on from; under the lock */
    uint64_t newest_generation; /* that any id has had; under the lock */
    struct uvas_slot *free_first, *free_last; /* first in, first out: an index comes back late; under the lock */
};

/* A record that is nobody's, its id still 0, all but its head zeroed; NULL: no memory. Under the lock, which it drops and takes again where it
 * makes a chunk. */
void *uvas_slots_take(struct uvas_slots *slots);
/* Names it: from now on uvas_slots_get finds it. Under the lock. */
uvas_id uvas_slots_name(struct uvas_slots *slots, struct uvas_slot *slot);
/* Back to the table; its id is dead. Under the lock. */
void uvas_slots_give(struct uvas_slots *slots, struct uvas_slot *slot);
/* The record with this id or NULL. Under the lock, or (see leases) where type-stable memory is enough. */
void *uvas_slots_get(const struct uvas_slots *slots, uvas_id id);
/* The record at an index, in use or not, or NULL past the last. Under the lock. */
struct uvas_slot *uvas_slots_at(const struct uvas_slots *slots, uint32_t index);
/* The child of a fork: every id is dead and none comes back; the parent's records are left as they are (to touch them would copy them).
 * Under the lock. */
void uvas_slots_forget(struct uvas_slots *slots);

#endif
