/* trim.c: memory that nobody uses goes back to the kernel, and the addresses stay.
 *
 * Whole spans in holes are decommitted; where a span is in part in use, the pages of the holes are emptied, and by uvas_arena_trim also the pages of slabs
 * in which no block lives. What is being given back is taken out of circulation first (a hole is BUSY, a slab rests: nobody allocates from it, and
 * those who free only mark), so no lock is held over a system call.
 */
#include <errno.h>

#include "arena.h"
#include "space.h"
#include "vm.h"

/* A hole that was BUSY is one again. Idle since `since` if it has memory: the kernel would not take it, or it came with a neighbour meanwhile. */
static void settle(struct uvas_arena *arena, struct uvas_run *run, uint64_t since) {
    uvas_pages_join(arena, run, run->region, uvas_run_base(run), uvas_run_bytes(run));
    if (uvas_spans_backed(run)) {
        uvas_holes_note_idle(&arena->holes, run, since);
    } else {
        uvas_holes_drop_idle(&arena->holes, run);
    }
}

/* Whoever gives memory back may come when the last block has gone and somebody closes the arena. Takes the lock; false: it is closed. */
bool uvas_trim_begin(struct uvas_arena *arena) {
    (void)pthread_mutex_lock(&arena->lock);
    if (!arena->id) {
        (void)pthread_mutex_unlock(&arena->lock);
        return false;
    }
    arena->giving++;
    return true;
}

void uvas_trim_end(struct uvas_arena *arena) {
    if (--arena->giving == 0) {
        (void)pthread_cond_broadcast(&arena->moved);
    }
    (void)pthread_mutex_unlock(&arena->lock);
}

void uvas_trim_guards(struct uvas_arena *arena) {
    if (!uvas_trim_begin(arena)) {
        return;
    }
    struct uvas_run *run = arena->stuck, *next;
    arena->stuck = NULL;
    for (; run; run = next) {
        next = run->next;
        size_t guard = atomic_load_explicit(&run->guard, memory_order_relaxed);
        (void)pthread_mutex_unlock(&arena->lock);
        int rc = uvas_vm_unguard(uvas_run_base(run) + uvas_run_bytes(run) - guard, guard);
        (void)pthread_mutex_lock(&arena->lock);
        if (rc == 0) {
            (void)uvas_pages_give(arena, run, NULL);
        } else {
            run->next = arena->stuck;
            arena->stuck = run;
        }
    }
    uvas_trim_end(arena);
}

uint64_t uvas_trim_holes(struct uvas_arena *arena, uint64_t until, size_t most) {
    uint64_t given = 0;
    if (!uvas_trim_begin(arena)) {
        return 0;
    }
    struct uvas_run *run;
    uint64_t now = uvas_pages_now();
    until = until < now ? until : now; /* what cannot be given back is tried once */
    while (most-- > 0 && (run = arena->holes.idle_first) && run->idle_since <= until) {
        uvas_holes_remove(&arena->holes, run);
        uvas_run_set_state(run, UVAS_RUN_BUSY);
        given += uvas_spans_unback(arena, run);
        settle(arena, run, now + 1);
    }
    uvas_trim_end(arena);
    return given;
}

/* The pages of a BUSY run that was a hole are emptied, where its spans stay. Under the lock, which it drops. */
static uint64_t empty(struct uvas_arena *arena, const struct uvas_run *run) {
    struct uvas_region *region = run->region;
    uintptr_t at = uvas_run_base(run), end = at + uvas_run_bytes(run), until;
    uint64_t given = 0;
    for (; at < end; at = until) {
        if (!uvas_region_touched(region, at, end, &until)) {
            continue;
        }
        (void)pthread_mutex_unlock(&arena->lock);
        int rc = uvas_empty_leased(region->reservation, at - region->reservation_base, until - at);
        (void)pthread_mutex_lock(&arena->lock);
        if (rc == 0) {
            uvas_region_untouch(region, at, until - at);
            given += until - at;
        }
    }
    return given;
}

uint64_t uvas_trim_pages(struct uvas_arena *arena) {
    uint64_t given = 0;
    if ((arena->flags & UVAS_ARENA_BARE) || !uvas_trim_begin(arena)) {
        return 0;
    }
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    for (uint32_t i = 0; i < count; i++) {
        const struct uvas_region *region = atomic_load_explicit(&arena->regions[i], memory_order_acquire);
        uintptr_t at = atomic_load_explicit(&region->base, memory_order_relaxed), until;
        uintptr_t end = at + atomic_load_explicit(&region->bytes, memory_order_relaxed);
        while (at < end) {
            struct uvas_run *run = uvas_region_find(region, at);
            at = uvas_run_base(run) + uvas_run_bytes(run);
            bool touched = uvas_run_state(run) == UVAS_RUN_HOLE && (uvas_region_touched(region, uvas_run_base(run), at, &until) || until < at);
            if (touched || (uvas_run_state(run) == UVAS_RUN_HOLE && uvas_spans_backed(run))) {
                uvas_holes_remove(&arena->holes, run);
                uvas_run_set_state(run, UVAS_RUN_BUSY);
                given += uvas_spans_unback(arena, run);
                given += empty(arena, run);
                settle(arena, run, uvas_pages_now());
                at = uvas_run_base(run) + uvas_run_bytes(run); /* what was freed beside it meanwhile is in it now, and no boundary any more */
            }
        }
    }
    uvas_trim_end(arena);
    return given;
}

/* ---- slabs that rest ------------------------------------------------------------------------------------------------------------------------------- */

/* The orphans with free blocks go to the heap of those that rest. Under the lock. */
static bool begin_rest(struct uvas_arena *arena) {
    if (arena->emptying) {
        return false; /* another thread is at it */
    }
    arena->emptying = true;
    uvas_heap_gather(&arena->orphans);
    for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
        struct uvas_slab *slab;
        while ((slab = arena->orphans.bins[class].free)) {
            uvas_slab_unlist(&arena->orphans.bins[class].free, slab);
            uvas_slab_list(&arena->resting.bins[class].free, slab);
            atomic_store_explicit(&slab->run.owner, &arena->resting, memory_order_release);
        }
    }
    return true;
}

/* They come back, with what was freed in them meanwhile. Under the lock. */
static void end_rest(struct uvas_arena *arena) {
    uvas_heap_gather(&arena->resting);
    uvas_heap_empty(&arena->resting);
    arena->emptying = false;
}

/* Whether no block of a resting slab that lies in [from, to) of it lives. Free ones stay free meanwhile. */
static bool all_free(struct uvas_slab *slab, size_t from, size_t to) {
    size_t block = atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed), count = atomic_load_explicit(&slab->run.count, memory_order_relaxed);
    size_t index = from / block, end = (to - 1) / block + 1;
    for (end = end < count ? end : count; index < end; index++) {
        if (atomic_load_explicit(&slab->blocks[index], memory_order_relaxed) != UVAS_BLOCK_FREE) {
            return false;
        }
    }
    return true;
}

/* Empties the pages of a resting slab that only free blocks lie in. Outside the lock. */
static uint64_t empty_slab(struct uvas_slab *slab) {
    struct uvas_region *region = slab->run.region;
    uintptr_t base = uvas_run_base(&slab->run);
    size_t bytes = uvas_run_bytes(&slab->run), page = uvas_page(), used = slab->high * (size_t)atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed);
    uint64_t given = 0;
    bytes = used < bytes ? (used + page - 1) & ~(page - 1) : bytes; /* beyond, nobody has ever been */
    for (size_t from = 0, to; from < bytes; from = to) {
        to = from + page;
        if (!all_free(slab, from, to)) {
            continue;
        }
        while (to < bytes && all_free(slab, to, to + page)) {
            to += page;
        }
        given += uvas_empty_leased(region->reservation, base + from - region->reservation_base, to - from) == 0 ? to - from : 0;
    }
    return given;
}

uint64_t uvas_trim_slabs(struct uvas_arena *arena) {
    uint64_t given = 0;
    if ((arena->flags & UVAS_ARENA_BARE) || arena->pages == UVAS_PAGES_HUGE || !uvas_trim_begin(arena)) {
        return 0;
    }
    if (begin_rest(arena)) {
        (void)pthread_mutex_unlock(&arena->lock);
        for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
            for (struct uvas_slab *slab = arena->resting.bins[class].free; slab; slab = slab->next) {
                given += empty_slab(slab);
            }
        }
        (void)pthread_mutex_lock(&arena->lock);
        end_rest(arena);
    }
    uvas_trim_end(arena);
    return given;
}
