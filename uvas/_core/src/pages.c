/* pages.c: runs of whole pages of an arena, taken and given back.
 *
 * Taking: the smallest hole that fits is split under the lock, and the run is BUSY from then on: nobody else's. What of it has no memory is committed
 * outside the lock (spans.c). Giving back: the hole joins its neighbours at once; its memory stays until it has been idle for long or somebody trims
 * (trim.c).
 *
 * If there is no room, in this order, each once: the arena grows (growth.c); what the threads keep is called in; idle memory is given back (if it is
 * the kernel that has none).
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <time.h>

#include "arena.h"
#include "space.h"
#include "failure.h"
#include "vm.h"

#define HUGE_LEAST ((size_t)4 << 20) /* bytes of a block whose pages the kernel is asked to make huge: NumPy's own choice for its arrays */

uint32_t uvas_page_shift;

uint64_t uvas_pages_now(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now); /* 4 ms or so: it decides about seconds */
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* ---- holes and their neighbours: under the lock ------------------------------------------------------------------------------------------------- */

static void forget_run(struct uvas_run *run) {
    uvas_run_set_state(run, UVAS_RUN_NONE);
    uvas_metadata_give(UVAS_METADATA_RUN, run);
}

static struct uvas_run *hole_at(const struct uvas_region *region, uintptr_t address) {
    uintptr_t base = atomic_load_explicit(&region->base, memory_order_relaxed);
    if (address - base >= atomic_load_explicit(&region->bytes, memory_order_relaxed)) {
        return NULL;
    }
    struct uvas_run *run = uvas_region_find(region, address);
    return run && uvas_run_state(run) == UVAS_RUN_HOLE ? run : NULL;
}

void uvas_pages_make_hole(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes) {
    uvas_run_place(run, region, base, bytes);
    uvas_run_set_state(run, UVAS_RUN_HOLE);
    uvas_region_mark(region, run, UVAS_RUN_HOLE);
    uvas_holes_add(&arena->holes, run);
}

/* A neighbour that is a hole goes into the one that is being made: its bytes, and if it is the largest part, since when it has been idle. */
static void absorb(struct uvas_arena *arena, struct uvas_run *hole, size_t *largest, uint64_t *since) {
    if (uvas_run_bytes(hole) > *largest && hole->idle_since) {
        *largest = uvas_run_bytes(hole);
        *since = hole->idle_since;
    }
    uvas_holes_remove(&arena->holes, hole);
    forget_run(hole);
}

void uvas_pages_join(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes) {
    struct uvas_run *before = hole_at(region, base - 1), *after = hole_at(region, base + bytes);
    size_t largest = bytes;
    uint64_t since = 0; /* now */
    if (before) {
        base = uvas_run_base(before);
        bytes += uvas_run_bytes(before);
        absorb(arena, before, &largest, &since);
    }
    if (after) {
        bytes += uvas_run_bytes(after);
        absorb(arena, after, &largest, &since);
    }
    uvas_pages_make_hole(arena, run, region, base, bytes);
    if (bytes >= UVAS_SPAN && !(arena->flags & UVAS_ARENA_BARE)) {
        uvas_holes_note_idle(&arena->holes, run, since ? since : uvas_pages_now());
    }
}

/* Cuts [base, base + bytes) out of a hole, as `run`. *spare describes a second rest and is NULL afterwards if it was needed. */
static void cut(struct uvas_arena *arena, struct uvas_run *hole, uintptr_t base, size_t bytes, struct uvas_run *run, struct uvas_run **spare) {
    struct uvas_region *region = hole->region;
    uintptr_t start = uvas_run_base(hole), end = start + uvas_run_bytes(hole);
    uint64_t idle_since = hole->idle_since;
    uvas_holes_remove(&arena->holes, hole);
    struct uvas_run *rest = hole;
    if (start < base) {
        uvas_pages_make_hole(arena, rest, region, start, base - start);
        if (idle_since && base - start >= UVAS_SPAN) {
            uvas_holes_note_idle(&arena->holes, rest, idle_since);
        }
        rest = NULL;
    }
    if (base + bytes < end) {
        if (!rest) {
            rest = *spare;
            *spare = NULL;
        }
        uvas_pages_make_hole(arena, rest, region, base + bytes, end - base - bytes);
        if (idle_since && end - base - bytes >= UVAS_SPAN) {
            uvas_holes_note_idle(&arena->holes, rest, idle_since);
        }
        rest = NULL;
    }
    if (rest) {
        forget_run(rest);
    }
    uvas_run_place(run, region, base, bytes);
    uvas_run_set_state(run, UVAS_RUN_BUSY);
    uvas_region_mark(region, run, UVAS_RUN_LARGE);
    arena->used_bytes += bytes;
    arena->peak_bytes = arena->used_bytes > arena->peak_bytes ? arena->used_bytes : arena->peak_bytes;
}

bool uvas_pages_idle(const struct uvas_arena *arena) {
    const struct uvas_run *idle = arena->holes.idle_first;
    uint64_t now = idle ? uvas_pages_now() : 0;
    return idle && now > idle->idle_since && now - idle->idle_since > arena->idle_ns;
}

bool uvas_pages_give(struct uvas_arena *arena, struct uvas_run *run, struct uvas_run *hole) {
    struct uvas_region *region = run->region;
    uintptr_t base = uvas_run_base(run);
    size_t bytes = uvas_run_bytes(run);
    arena->used_bytes -= bytes;
    if (hole) {
        uvas_run_set_state(run, UVAS_RUN_NONE);
    }
    uvas_pages_join(arena, hole ? hole : run, region, base, bytes);
    return uvas_pages_idle(arena);
}

/* ---- taking ---------------------------------------------------------------------------------------------------------------------------------------------- */

static int say_full(const struct uvas_request *request, bool limit) {
    struct uvas_arena *arena = request->arena;
    (void)pthread_mutex_lock(&arena->lock);
    const struct uvas_run *largest = uvas_holes_largest(&arena->holes);
    size_t used = arena->used_bytes, hole = largest ? uvas_run_bytes(largest) : 0;
    (void)pthread_mutex_unlock(&arena->lock);
    struct uvas_failure *failure = limit ? uvas_fail(UVAS_FAILURE_MEMORY, -ENOMEM) : uvas_fail(UVAS_FAILURE_EXHAUSTED, -ENOSPC);
    failure->size = request->asked;
    failure->value = limit ? arena->limit : arena->reserved_bytes;
    failure->other_size = limit ? hole : 0; /* of exhaustion it is the window, and there was none */
    (void)snprintf(failure->what, sizeof failure->what, "arena %.50s", arena->name);
    (void)snprintf(failure->remedy, sizeof failure->remedy, "%s",
                   limit ? "free blocks, or give the arena a larger limit" : "free blocks, or make the arena over a space, where it can grow");
    return uvas_fail_say(failure, "arena \"%s\" has no room for %zu bytes: %zu are in use of %s %zu, the largest hole has %zu", arena->name, request->asked,
                         used, limit ? "a limit of" : "its", (size_t)failure->value, hole);
}

enum lack { LACK_NONE, LACK_ROOM, LACK_LIMIT, LACK_MEMORY, LACK_METADATA, LACK_WAIT, LACK_ARENA };

/* Under the lock. */
static enum lack carve(const struct uvas_request *request, struct uvas_run *run, struct uvas_run **spare) {
    struct uvas_arena *arena = request->arena;
    if (arena->id != request->id) {
        return LACK_ARENA;
    }
    if (arena->limit && (request->bytes > arena->limit || arena->used_bytes > arena->limit - request->bytes)) {
        return LACK_LIMIT;
    }
    struct uvas_run *hole = uvas_holes_best(&arena->holes, request->bytes, request->align);
    if (!hole) {
        return LACK_ROOM;
    }
    uintptr_t base = uvas_run_base(hole);
    cut(arena, hole, base + (-base & (request->align - 1)), request->bytes, run, spare);
    return LACK_NONE;
}

/* Its memory is there; what is said of the block is seen to. Whether it held other bytes than zeros. Under the lock, which it drops. */
static bool hand_out(const struct uvas_request *request, const struct uvas_run *run) {
    struct uvas_arena *arena = request->arena;
    uintptr_t base = uvas_run_base(run), end = base + request->bytes, until;
    bool first = uvas_region_touched(run->region, base, end, &until), touched = first || until < end;
    bool fresh = !first || until < end;
    if (fresh && request->bytes >= HUGE_LEAST && arena->pages == UVAS_PAGES_ANY) {
        uintptr_t aligned = (base + UVAS_SPAN - 1) & ~(UVAS_SPAN - 1), last = end & ~(UVAS_SPAN - 1);
        (void)pthread_mutex_unlock(&arena->lock);
        if (!uvas_party_whole(run->region->reservation)) { /* what a driver holds is left alone */
            (void)uvas_vm_advise_huge(aligned, last - aligned); /* a wish */
        }
        (void)pthread_mutex_lock(&arena->lock);
    }
    if (request->zero && touched) {
        uvas_spans_zero(arena, run->region, base, end);
    }
    uvas_region_touch(run->region, base, request->bytes);
    return touched;
}

/* One try. *rc: what the commit said. */
static enum lack try_once(const struct uvas_request *request, struct uvas_run *run, bool *touched, int *rc) {
    struct uvas_arena *arena = request->arena;
    bool wait = request->effort != UVAS_EFFORT_NO_WAIT;
    struct uvas_run *spare = request->align > uvas_page() ? uvas_metadata_take(UVAS_METADATA_RUN, wait) : NULL;
    if (!spare && request->align > uvas_page()) {
        return wait ? LACK_METADATA : LACK_WAIT;
    }
    (void)pthread_mutex_lock(&arena->lock);
    enum lack lack = carve(request, run, &spare);
    if (lack == LACK_NONE && !(arena->flags & UVAS_ARENA_BARE)) {
        *rc = uvas_spans_back(arena, run, request->effort);
        if (*rc < 0) {
            lack = *rc == -EAGAIN && !wait ? LACK_WAIT : LACK_MEMORY;
        } else {
            *touched = hand_out(request, run);
        }
    }
    (void)pthread_mutex_unlock(&arena->lock);
    if (spare) {
        uvas_metadata_give(UVAS_METADATA_RUN, spare);
    }
    return lack;
}

void uvas_pages_collect(struct uvas_arena *arena) {
    uvas_doors_shut(arena);
    (void)pthread_mutex_lock(&arena->lock);
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        uvas_heap_empty(heap);
    }
    if (!arena->emptying) {
        uvas_heap_gather(&arena->resting); /* who had read that a slab rests may have pushed it there after it was taken back */
    }
    uvas_heap_empty(&arena->orphans);
    (void)pthread_mutex_unlock(&arena->lock);
    uvas_doors_open(arena);
}

/* Undoes carve: what was cut is a hole again, and its descriptor is replaced; *run, or a slab's spare, is NULL where there is none. */
static void put_back(const struct uvas_request *request, struct uvas_run **run) {
    struct uvas_arena *arena = request->arena;
    (void)pthread_mutex_lock(&arena->lock);
    (void)uvas_pages_give(arena, *run, request->slab ? (*run)->spare : NULL);
    (void)pthread_mutex_unlock(&arena->lock);
    struct uvas_run *fresh = uvas_metadata_take(UVAS_METADATA_RUN, request->effort != UVAS_EFFORT_NO_WAIT);
    *(request->slab ? &(*run)->spare : run) = fresh;
}

int uvas_pages_take(const struct uvas_request *request, struct uvas_run **run, bool *touched) {
    struct uvas_arena *arena = request->arena;
    bool wait = request->effort != UVAS_EFFORT_NO_WAIT, full = request->effort == UVAS_EFFORT_FULL;
    bool collected = !full, trimmed = !full;
    int rc = 0;
    enum lack lack = LACK_ROOM;
    while (true) {
        lack = try_once(request, *run, touched, &rc);
        if (lack == LACK_MEMORY || (lack == LACK_WAIT && uvas_run_state(*run) == UVAS_RUN_BUSY)) {
            put_back(request, run);
            if (!*run || (request->slab && !(*run)->spare)) {
                lack = LACK_METADATA;
            }
        }
        if (lack == LACK_NONE || lack == LACK_WAIT || lack == LACK_METADATA || lack == LACK_ARENA || !wait) {
            break;
        }
        struct uvas_failure said = *uvas_last_failure();
        int grown = lack == LACK_ROOM ? uvas_arena_grow(request) : -ENOSPC;
        if (grown == 0) {
            continue;
        }
        if (lack == LACK_ROOM && grown != -ENOSPC) {
            said = *uvas_last_failure(); /* a limit of the process, say: more to the point than that there is no room */
        }
        if (!collected) {
            collected = true;
            uvas_trim_guards(arena);
            uvas_pages_collect(arena);
            continue;
        }
        if (lack == LACK_MEMORY && !trimmed) {
            trimmed = true;
            (void)uvas_trim_holes(arena, UINT64_MAX, SIZE_MAX);
            continue;
        }
        if (lack == LACK_MEMORY || (grown < 0 && grown != -ENOSPC)) {
            *uvas_fail(said.kind, said.code) = said;
            rc = said.code;
        } else {
            rc = say_full(request, lack == LACK_LIMIT);
        }
        break;
    }
    switch (lack) {
    case LACK_NONE: return 0;
    case LACK_WAIT: return -EAGAIN;
    case LACK_METADATA: return wait ? uvas_fail_memory(0, sizeof **run, "the host") : -EAGAIN;
    case LACK_ARENA: return wait ? uvas_fail_released("arena", request->id) : -EAGAIN;
    default: return wait ? rc : -EAGAIN;
    }
}

/* ---- another size in place --------------------------------------------------------------------------------------------------------------------------- */

static int shrink(struct uvas_arena *arena, struct uvas_run *run, size_t bytes, struct uvas_run *tail) {
    (void)pthread_mutex_lock(&arena->lock);
    uintptr_t base = uvas_run_base(run), end = base + uvas_run_bytes(run);
    uvas_run_place(run, run->region, base, bytes);
    uvas_region_mark(run->region, run, UVAS_RUN_LARGE);
    uvas_run_place(tail, run->region, base + bytes, end - base - bytes);
    bool idle = uvas_pages_give(arena, tail, NULL);
    (void)pthread_mutex_unlock(&arena->lock);
    if (idle) {
        (void)uvas_trim_holes(arena, uvas_pages_now() - arena->idle_ns, 1);
    }
    return 0;
}

static int extend(struct uvas_arena *arena, struct uvas_run *run, size_t bytes, struct uvas_run *tail) {
    size_t more = bytes - uvas_run_bytes(run);
    uintptr_t end = uvas_run_base(run) + uvas_run_bytes(run);
    struct uvas_run *none = NULL;
    (void)pthread_mutex_lock(&arena->lock);
    struct uvas_run *hole = hole_at(run->region, end);
    bool room = hole && uvas_run_bytes(hole) >= more && !(arena->limit && arena->used_bytes > arena->limit - (more < arena->limit ? more : arena->limit));
    if (room) {
        cut(arena, hole, end, more, tail, &none);
        int rc = arena->flags & UVAS_ARENA_BARE ? 0 : uvas_spans_back(arena, tail, UVAS_EFFORT_MODEST);
        if (rc == 0) {
            if (!(arena->flags & UVAS_ARENA_BARE)) {
                uvas_region_touch(run->region, end, more);
            }
            uvas_run_set_state(tail, UVAS_RUN_NONE);
            uvas_run_place(run, run->region, uvas_run_base(run), bytes);
            uvas_region_mark(run->region, run, UVAS_RUN_LARGE);
            arena->ended_bytes += more; /* allocated, if not by a thread's own count */
        } else {
            (void)uvas_pages_give(arena, tail, NULL);
            tail = NULL;
            room = false;
        }
    }
    (void)pthread_mutex_unlock(&arena->lock);
    if (tail) {
        uvas_metadata_give(UVAS_METADATA_RUN, tail);
    }
    return room ? 0 : -EAGAIN;
}

int uvas_pages_resize(struct uvas_arena *arena, struct uvas_run *run, size_t bytes) {
    if (bytes == uvas_run_bytes(run)) {
        return 0;
    }
    struct uvas_run *tail = uvas_metadata_take(UVAS_METADATA_RUN, true);
    if (!tail) {
        return -EAGAIN;
    }
    return bytes < uvas_run_bytes(run) ? shrink(arena, run, bytes, tail) : extend(arena, run, bytes, tail);
}
