/* free.c: blocks freed. The short way first: back to a slab that the thread's heap owns. */
#include <errno.h>
#include <string.h>

#include "block.h"
#include "failure.h"

#define POISON 0xdf

enum { CHANGED = UVAS_WANTS_OUTSIDE + 1 }; /* an answer: the slab is to go to another list */

/* ---- by the owner: inside ------------------------------------------------------------------------------------------------------------------------- */

/* Whether a block of the slab begins there. false also where the slab is elsewhere now. */
QUICK bool begins(const struct uvas_slab *slab, uintptr_t address, size_t *index) {
    bool there;
    *index = uvas_slab_index(slab, address - uvas_run_base(&slab->run), &there);
    return *index < atomic_load_explicit(&slab->run.count, memory_order_relaxed) && there;
}

/* 0, CHANGED, or -EINVAL: it is not the base of a live block. */
QUICK int give_back(struct uvas_heap *heap, struct uvas_slab *slab, uintptr_t address) {
    size_t index;
    if (!LIKELY(begins(slab, address, &index) && atomic_load_explicit(&slab->blocks[index], memory_order_relaxed) == UVAS_BLOCK_LIVE)) {
        return -EINVAL;
    }
    atomic_store_explicit(&slab->blocks[index], UVAS_BLOCK_FREE, memory_order_release);
    struct uvas_bin *bin = uvas_slab_bin(heap, slab);
    if (LIKELY(bin->knows < bin->most)) {
        bin->known[bin->knows++] = (struct uvas_known){address, &slab->blocks[index]};
        return 0;
    }
    slab->summary |= UINT64_C(1) << index / UVAS_GROUP;
    int32_t used = (int32_t)--slab->used; /* below 0: unlisted */
    return LIKELY(used > 0 || (used == 0 && !slab->next && !slab->previous)) ? 0 : CHANGED;
}

/* ---- by others --------------------------------------------------------------------------------------------------------------------------------------- */

/* By a thread that does not own the slab. */
static int free_remote(struct uvas_slab *slab, uintptr_t address) {
    size_t index;
    unsigned char live = UVAS_BLOCK_LIVE;
    if (!begins(slab, address, &index) || index / UVAS_GROUP >= slab->run.groups ||
        atomic_load_explicit(&slab->blocks[index], memory_order_relaxed) != UVAS_BLOCK_LIVE ||
        !atomic_compare_exchange_strong(&slab->blocks[index], &live, UVAS_BLOCK_FREED)) {
        return -EINVAL;
    }
    uvas_slab_notify(slab);
    return 0;
}

static int free_small(struct uvas_heap *heap, struct uvas_slab *slab, uintptr_t address) {
    if (atomic_load_explicit(&slab->run.owner, memory_order_relaxed) != heap) {
        return free_remote(slab, address);
    }
    int rc = give_back(heap, slab, address);
    if (rc == CHANGED) {
        uvas_slab_changed(heap, slab);
    }
    return rc == CHANGED ? 0 : rc;
}

/* ---- wherever it lies -------------------------------------------------------------------------------------------------------------------------------- */

/* In a region that is not the one where the last block was. Inside. */
SLOW static bool look_around(struct uvas_heap *heap, uintptr_t address) {
    struct uvas_region *region = uvas_arena_region(heap->arena, address);
    if (region) {
        heap->near_base = atomic_load_explicit(&region->base, memory_order_relaxed);
        heap->near_bytes = atomic_load_explicit(&region->bytes, memory_order_relaxed);
        heap->near_map = region->map;
        heap->near_shift = uvas_page_shift;
    }
    return region != NULL;
}

/* A large block; or a slab's that the page's own pointer did not lead to, as that may be an old one. Inside. */
static int free_found(struct uvas_heap *heap, uintptr_t address, struct uvas_run **found) {
    const struct uvas_region *region = uvas_arena_region(heap->arena, address);
    struct uvas_run *run = region ? uvas_region_find(region, address) : NULL;
    uint32_t state = run ? uvas_run_state(run) : UVAS_RUN_NONE;
    if (state == UVAS_RUN_SLAB) {
        return free_small(heap, (struct uvas_slab *)run, address);
    }
    *found = run;
    return state == UVAS_RUN_LARGE && address == uvas_run_base(run) ? uvas_large_free(heap, run) : -EINVAL;
}

/* 0, UVAS_GIVE_IDLE, UVAS_WANTS_OUTSIDE with *found, or -EINVAL. Inside. */
static int free_inside(struct uvas_heap *heap, uintptr_t address, struct uvas_run **found) {
    if (!LIKELY(address - heap->near_base < heap->near_bytes) && !look_around(heap, address)) {
        return -EINVAL;
    }
    struct uvas_run *run = atomic_load_explicit(&heap->near_map[(address - heap->near_base) >> heap->near_shift], memory_order_acquire);
    if (run && uvas_run_state(run) == UVAS_RUN_SLAB) {
        int rc = free_small(heap, (struct uvas_slab *)run, address);
        return LIKELY(rc != -EINVAL) ? rc : free_found(heap, address, found);
    }
    if (run && uvas_run_state(run) == UVAS_RUN_LARGE && address == uvas_run_base(run)) {
        *found = run;
        return uvas_large_free(heap, run);
    }
    return free_found(heap, address, found);
}

static void poison(const struct uvas_arena *arena, uintptr_t address) {
    struct uvas_region *region = uvas_arena_region(arena, address);
    struct uvas_run *run;
    uintptr_t base;
    size_t bytes;
    if (region && uvas_block_locate(region, address, &run, &base, &bytes) && base == address) {
        memset((void *)base, POISON, bytes);
    }
}

static int free_any(uvas_id id, uintptr_t address, bool wait) {
    if (uvas_arena_inherited(id)) {
        return 0; /* the parent's: here it is memory like any other, and nobody hands it out */
    }
    int rc;
    struct uvas_heap *heap = uvas_heap_of(id, wait, &rc);
    if (!heap) {
        return rc;
    }
    if (heap->hardened && !wait) {
        return -EAGAIN;
    }
    if (heap->hardened & UVAS_ARENA_POISON) {
        poison(heap->arena, address);
    }
    struct uvas_run *run;
    struct uvas_arena *arena = heap->arena;
    rc = uvas_heap_go_in(heap, id, wait);
    if (rc < 0) {
        return rc;
    }
    rc = free_inside(heap, address, &run);
    uvas_heap_leave(heap);
    if (rc == UVAS_WANTS_OUTSIDE) {
        uvas_large_free_guarded(arena, run);
    } else if (rc == UVAS_GIVE_IDLE) {
        uvas_idle_see_to(heap, wait);
    }
    return rc == -EINVAL ? uvas_block_not_live(address) : 0;
}

/* Not a block of the heap's own slabs, or not where the last one was. Inside; goes outside. */
SLOW static int free_other(struct uvas_heap *heap, uintptr_t address, bool wait) {
    struct uvas_run *run;
    int rc = free_inside(heap, address, &run); /* never UVAS_WANTS_OUTSIDE: doors of arenas with guards are not open */
    uvas_heap_leave(heap);
    if (rc == UVAS_GIVE_IDLE) {
        uvas_idle_see_to(heap, wait);
    }
    return rc == -EINVAL ? uvas_block_not_live(address) : 0;
}

/* In another thread's slab, perhaps. Inside; goes outside. */
SLOW static int free_elsewhere(struct uvas_heap *heap, struct uvas_run *run, uintptr_t address, bool wait) {
    if (LIKELY(uvas_run_state(run) == UVAS_RUN_SLAB && free_remote((struct uvas_slab *)run, address) == 0)) {
        uvas_heap_leave(heap);
        return 0;
    }
    return free_other(heap, address, wait);
}

SLOW static int free_changed(struct uvas_heap *heap, struct uvas_slab *slab) {
    uvas_slab_changed(heap, slab);
    uvas_heap_leave(heap);
    return 0;
}

QUICK int free_block(uvas_id id, uintptr_t address, bool wait) {
    struct uvas_heap *heap = uvas_thread.last;
    if (!LIKELY(heap && uvas_heap_enter(heap, id))) {
        return free_any(id, address, wait);
    }
    uintptr_t offset = address - heap->near_base;
    if (LIKELY(offset < heap->near_bytes)) {
        struct uvas_run *run = atomic_load_explicit(&heap->near_map[offset >> heap->near_shift], memory_order_acquire);
        if (!LIKELY(run != NULL)) {
            return free_other(heap, address, wait);
        }
        if (!LIKELY(atomic_load_explicit(&run->owner, memory_order_relaxed) == heap)) { /* then it is a slab */
            return free_elsewhere(heap, run, address, wait);
        }
        int rc = give_back(heap, (struct uvas_slab *)run, address);
        if (LIKELY(rc == 0)) {
            uvas_heap_leave(heap);
            return 0;
        }
        if (rc == CHANGED) {
            return free_changed(heap, (struct uvas_slab *)run);
        }
    }
    return free_other(heap, address, wait);
}

int uvas_free(uvas_id arena, uintptr_t address) {
    return free_block(arena, address, true);
}

int uvas_free_try(uvas_id arena, uintptr_t address) {
    return free_block(arena, address, false);
}
