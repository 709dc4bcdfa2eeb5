/* growth.c: the reservations of an arena: the one that it was made in, or those that it takes of its space. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>

#include "arena.h"
#include "failure.h"
#include "space.h"
#include "vm.h"

#define GROWTH_DOUBLES_EVERY 8u /* regions */

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

static int open_huge(const struct uvas_arena *arena, struct uvas_region *region, size_t bytes) {
    if (arena->pages != UVAS_PAGES_HUGE) {
        return 0;
    }
    region->huge = uvas_vm_memfd_huge(arena->name, bytes);
    return region->huge < 0 ? uvas_fail_system(0, bytes, "memfd_create(MFD_HUGETLB)", region->huge) : 0;
}

int uvas_arena_add_region(struct uvas_arena *arena, uvas_id reservation, uintptr_t base, size_t size, bool ours) {
    uintptr_t start = base, end = base + size;
    if ((arena->flags & UVAS_ARENA_GUARD) && uvas_reservation_moves(reservation)) {
        return uvas_fail_unsupported("guards in memory that moves", "an arena without guards, or a space without private devices",
                                     "a guard stays where it is, and the granule around it with it: [0x%lx, 0x%lx)", base, base + size);
    }
    if ((arena->flags & (UVAS_ARENA_GUARD | UVAS_ARENA_BIND)) && uvas_party_whole(reservation)) {
        return uvas_fail_unsupported("guards or nodes in memory that a driver holds", "an arena without them",
                                     "pages at [0x%lx, 0x%lx) are registered or mapped by a device's driver, and stay as they are", base, base + size);
    }
    if (arena->pages == UVAS_PAGES_HUGE) {
        start = round_up(start, UVAS_SPAN);
        end = end / UVAS_SPAN * UVAS_SPAN;
        if (start >= end) {
            return uvas_fail_invalid("the reservation [0x%lx, +0x%zx) holds no aligned huge page of 0x%zx bytes", base, size, UVAS_SPAN);
        }
    }
    struct uvas_run *hole = uvas_metadata_take(UVAS_METADATA_RUN, true);
    struct uvas_region *region = hole ? uvas_region_take((end - start) >> uvas_page_shift) : NULL;
    if (!region) {
        if (hole) {
            uvas_metadata_give(UVAS_METADATA_RUN, hole);
        }
        return uvas_fail_memory(base, size, "the host");
    }
    region->huge = -1;
    region->arena = arena;
    region->reservation = reservation;
    region->reservation_base = base;
    region->ours = ours;
    atomic_store_explicit(&region->base, start, memory_order_relaxed);
    atomic_store_explicit(&region->bytes, end - start, memory_order_relaxed);
    int rc = open_huge(arena, region, end - start);
    rc = rc == 0 ? uvas_lease_region(reservation, !(arena->flags & UVAS_ARENA_BARE), region, arena->name, &region->lease) : rc;
    if (rc < 0) {
        uvas_vm_close(region->huge);
        uvas_metadata_give(UVAS_METADATA_RUN, hole);
        uvas_region_give(region);
        return rc;
    }
    (void)pthread_mutex_lock(&arena->lock);
    arena->reserved_bytes += end - start;
    uvas_pages_make_hole(arena, hole, region, start, end - start);
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    atomic_store_explicit(&arena->regions[count], region, memory_order_release);
    atomic_store_explicit(&arena->region_count, count + 1, memory_order_release);
    atomic_store_explicit(&region->arena_id, arena->id, memory_order_release);
    (void)pthread_mutex_unlock(&arena->lock);
    return 0;
}

int uvas_arena_drop_region(struct uvas_arena *arena, struct uvas_region *region) {
    uintptr_t base = atomic_load_explicit(&region->base, memory_order_relaxed);
    size_t bytes = atomic_load_explicit(&region->bytes, memory_order_relaxed);
    int rc = 0;
    atomic_store_explicit(&region->arena_id, 0, memory_order_release);
    if (!(arena->flags & UVAS_ARENA_BARE) && !region->ours) {
        (void)uvas_decommit_leased(region->reservation, base - region->reservation_base, bytes); /* or it goes with the caller's reservation */
    }
    uvas_unlease_region(region->reservation, region->lease);
    if (region->ours) {
        int released = uvas_release(region->reservation);
        rc = released < 0 ? released : rc;
    }
    uvas_vm_close(region->huge);
    for (uintptr_t at = base; at - base < bytes;) { /* of a closing arena one hole, or some and what stuck between them */
        struct uvas_run *run = uvas_region_find(region, at);
        assert(run && uvas_run_state(run) != UVAS_RUN_LARGE && uvas_run_state(run) != UVAS_RUN_SLAB);
        at += uvas_run_bytes(run);
        atomic_store_explicit(&run->state, UVAS_RUN_NONE, memory_order_release);
        uvas_metadata_give(UVAS_METADATA_RUN, run);
    }
    uvas_region_give(region);
    return rc;
}

/* Another reservation of the arena's space. 0, or what is said. */
int uvas_arena_grow(const struct uvas_request *request) {
    struct uvas_arena *arena = request->arena;
    size_t least = round_up(request->bytes + (request->align > uvas_page() ? request->align : 0), UVAS_SPAN);
    if (!arena->space || least < request->bytes) {
        return -ENOSPC;
    }
    (void)pthread_mutex_lock(&arena->lock);
    bool other = arena->growing;
    while (arena->growing) {
        (void)pthread_cond_wait(&arena->moved, &arena->lock);
    }
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    bool alive = arena->id == request->id, allowed = !other && alive && count < UVAS_REGIONS_MAX;
    arena->growing = allowed;
    (void)pthread_mutex_unlock(&arena->lock);
    if (!allowed) {
        return other || !alive ? 0 : -ENOSPC; /* 0: look again: there is room now, perhaps, or it is closed */
    }
    struct uvas_where where = {.align = request->align > UVAS_SPAN ? request->align : UVAS_SPAN, .name = arena->name};
    struct uvas_reservation got;
    size_t wanted = arena->growth << count / GROWTH_DOUBLES_EVERY;
    wanted = wanted > least && wanted >= arena->growth ? wanted : least;
    int rc = uvas_reserve(arena->space, wanted, &where, &got);
    while (rc < 0 && rc != -ESTALE && wanted > least) {
        wanted = wanted / 2 > least ? round_up(wanted / 2, UVAS_SPAN) : least;
        rc = uvas_reserve(arena->space, wanted, &where, &got);
    }
    if (rc == 0) {
        rc = uvas_arena_add_region(arena, got.id, got.base, got.size, true);
        if (rc < 0) {
            (void)uvas_release(got.id);
        }
    }
    (void)pthread_mutex_lock(&arena->lock);
    arena->growing = false;
    (void)pthread_cond_broadcast(&arena->moved);
    (void)pthread_mutex_unlock(&arena->lock);
    return rc;
}
