/* find.c: the block that holds an address, by any thread at any time, without a lock. */
#include <errno.h>

#include "arena.h"
#include "failure.h"
#include "space.h"

struct uvas_region *uvas_arena_region(const struct uvas_arena *arena, uintptr_t address) {
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++) {
        struct uvas_region *region = atomic_load_explicit(&arena->regions[i], memory_order_acquire);
        if (region && address - atomic_load_explicit(&region->base, memory_order_relaxed) < atomic_load_explicit(&region->bytes, memory_order_relaxed)) {
            return region;
        }
    }
    return NULL;
}

static bool slab_block(struct uvas_slab *slab, uintptr_t address, uintptr_t *base, size_t *bytes) {
    uintptr_t start = uvas_run_base(&slab->run);
    bool begins;
    size_t index = uvas_slab_index(slab, address - start, &begins), size = atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed);
    if (index >= atomic_load_explicit(&slab->run.count, memory_order_relaxed) || index / UVAS_GROUP >= slab->run.groups) {
        return false;
    }
    if (atomic_load_explicit(&slab->blocks[index], memory_order_acquire) != UVAS_BLOCK_LIVE) {
        return false;
    }
    *base = start + index * size;
    *bytes = size;
    return address - *base < size;
}

/* A live block; *run: its run. By anyone. */
bool uvas_block_locate(const struct uvas_region *region, uintptr_t address, struct uvas_run **run, uintptr_t *base, size_t *bytes) {
    *run = uvas_region_find(region, address);
    uint32_t state = *run ? uvas_run_state(*run) : UVAS_RUN_NONE;
    if (state == UVAS_RUN_SLAB) {
        return slab_block((struct uvas_slab *)*run, address, base, bytes);
    }
    if (state != UVAS_RUN_LARGE) {
        return false;
    }
    *base = uvas_run_base(*run);
    *bytes = uvas_run_bytes(*run) - atomic_load_explicit(&(*run)->guard, memory_order_relaxed);
    return address - *base < *bytes;
}

/* The region of the reservation that holds an address, and its arena; NULL: there is none. */
static struct uvas_region *region_of(uintptr_t address, uvas_id *arena) {
    struct uvas_region *region = uvas_region_at(address);
    *arena = region ? atomic_load_explicit(&region->arena_id, memory_order_acquire) : 0;
    return *arena ? region : NULL;
}

int uvas_find_arena(uintptr_t address, uvas_id *out) {
    uvas_id arena;
    if (!region_of(address, &arena)) {
        return -ENOENT;
    }
    *out = arena;
    return 0;
}

int uvas_find_allocation(uintptr_t address, struct uvas_allocation *out) {
    uvas_id arena;
    struct uvas_region *region = region_of(address, &arena);
    struct uvas_run *run;
    uintptr_t base;
    size_t bytes;
    if (!region || address - atomic_load_explicit(&region->base, memory_order_relaxed) >= atomic_load_explicit(&region->bytes, memory_order_relaxed)) {
        return -ENOENT;
    }
    if (!uvas_block_locate(region, address, &run, &base, &bytes)) {
        return -ENOENT;
    }
    *out = (struct uvas_allocation){.base = base, .size = bytes, .arena = arena};
    return 0;
}

int uvas_block_not_live(uintptr_t address) {
    return uvas_fail_invalid("0x%lx is not the base of a live block of this arena: it was freed already, or never allocated there", address);
}

int uvas_allocation_size(uvas_id id, uintptr_t address, size_t *out) {
    struct uvas_arena *arena = uvas_arena_inherited(id);
    if (!arena) {
        arena = uvas_arena_get(id);
    }
    if (!arena) {
        return -ESTALE;
    }
    struct uvas_region *region = uvas_arena_region(arena, address);
    struct uvas_run *run;
    uintptr_t base;
    size_t bytes;
    if (!region || !uvas_block_locate(region, address, &run, &base, &bytes) || base != address) {
        return uvas_block_not_live(address);
    }
    *out = bytes;
    return 0;
}
