/* slots.c: see slots.h. */
#include "slots.h"

#include <assert.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "registry.h"

#define INDEX_BITS 24
#define GENERATION_BITS 36
#define INDEX_MASK ((UINT64_C(1) << INDEX_BITS) - 1)
#define GENERATION_MASK ((UINT64_C(1) << GENERATION_BITS) - 1)
#define GENERATION_STEP (UINT64_C(1) << INDEX_BITS)
#define KIND_SHIFT (INDEX_BITS + GENERATION_BITS)

_Static_assert((uint64_t)UVAS_SLOTS_CHUNK *UVAS_SLOTS_CHUNKS_MAX == UINT64_C(1) << INDEX_BITS, "an index names every record");

static void append_free(struct uvas_slots *slots, struct uvas_slot *slot) {
    slot->next = NULL;
    if (slots->free_last) {
        slots->free_last->next = slot;
    } else {
        slots->free_first = slot;
    }
    slots->free_last = slot;
}

static struct uvas_slot *pop_free(struct uvas_slots *slots) {
    struct uvas_slot *slot = slots->free_first;
    if (slot) {
        slots->free_first = slot->next;
        slots->free_last = slot->next ? slots->free_last : NULL;
    }
    return slot;
}

static void add_chunk(struct uvas_slots *slots, char *chunk) {
    uint64_t first = (uint64_t)slots->made * UVAS_SLOTS_CHUNK;
    for (uint64_t i = 0; i < UVAS_SLOTS_CHUNK; i++) {
        struct uvas_slot *slot = (struct uvas_slot *)(void *)(chunk + i * slots->record_bytes);
        slot->next_id = slots->kind << KIND_SHIFT | (slots->oldest_generation + 1) << INDEX_BITS | (first + i);
        append_free(slots, slot);
    }
    atomic_store_explicit(&slots->chunks[slots->made++], chunk, memory_order_release);
}

void *uvas_slots_take(struct uvas_slots *slots) {
    struct uvas_slot *slot = pop_free(slots);
    if (!slot) {
        uvas_registry_unlock();
        char *chunk = calloc(UVAS_SLOTS_CHUNK, slots->record_bytes); /* outside the lock: it may ask the kernel */
        uvas_registry_lock();
        bool room = slots->made < UVAS_SLOTS_CHUNKS_MAX;
        if (chunk && room) {
            add_chunk(slots, chunk);
        }
        slot = pop_free(slots);
        if (chunk && !room) { /* rare enough to free it under the lock: 16 million records live */
            free(chunk);
        }
    }
    if (slot) {
        memset(slot + 1, 0, slots->record_bytes - sizeof *slot);
    }
    return slot;
}

uvas_id uvas_slots_name(struct uvas_slots *slots, struct uvas_slot *slot) {
    assert(atomic_load_explicit(&slot->id, memory_order_relaxed) == 0);
    uvas_id id = slot->next_id;
    uint64_t generation = id >> INDEX_BITS & GENERATION_MASK;
    slots->newest_generation = generation > slots->newest_generation ? generation : slots->newest_generation;
    slot->next_id += GENERATION_STEP;
    atomic_store_explicit(&slot->id, id, memory_order_release);
    return id;
}

void uvas_slots_give(struct uvas_slots *slots, struct uvas_slot *slot) {
    atomic_store_explicit(&slot->id, 0, memory_order_relaxed);
    bool spent = (slot->next_id >> KIND_SHIFT) != slots->kind; /* the generations ran over into the kind */
    if (!spent) {
        append_free(slots, slot);
    }
}

struct uvas_slot *uvas_slots_at(const struct uvas_slots *slots, uint32_t index) {
    char *chunk = atomic_load_explicit(&slots->chunks[index / UVAS_SLOTS_CHUNK], memory_order_acquire);
    return chunk ? (struct uvas_slot *)(void *)(chunk + (size_t)(index % UVAS_SLOTS_CHUNK) * slots->record_bytes) : NULL;
}

void *uvas_slots_get(const struct uvas_slots *slots, uvas_id id) {
    if (id == 0 || id >> KIND_SHIFT != slots->kind) { /* a slot that is not in use has the id 0 too */
        return NULL;
    }
    struct uvas_slot *slot = uvas_slots_at(slots, (uint32_t)(id & INDEX_MASK));
    return slot && atomic_load_explicit(&slot->id, memory_order_acquire) == id ? slot : NULL;
}

void uvas_slots_forget(struct uvas_slots *slots) {
    for (uint32_t chunk = 0; chunk < slots->made; chunk++) {
        atomic_store_explicit(&slots->chunks[chunk], NULL, memory_order_relaxed);
    }
    slots->made = 0;
    slots->oldest_generation = slots->newest_generation;
    slots->free_first = slots->free_last = NULL;
}
