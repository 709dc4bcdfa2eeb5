/* pages.c: runs of whole pages of an arena, taken and given back; the memory behind them; growth.
 *
 * Taking: the smallest hole that fits is split under the lock, and the run is BUSY from then on: nobody else's. What of it has no memory is committed
 * outside the lock, span by span (a span on its way is waited for by whoever needs it too). Giving back: the hole joins its neighbours at once; its
 * memory stays until it has been idle for long or somebody trims. A hole whose memory is being given back is BUSY too, so nobody takes it meanwhile.
 *
 * If there is no room, in this order, each once: the arena grows; what the threads keep is called in; idle memory is given back (if it is the kernel
 * that has none).
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "arena.h"
#include "failure.h"
#include "space.h"
#include "vm.h"

#define AHEAD_SHARE 8u                   /* of what is committed already is committed in advance, so that calls get rarer as an arena grows */
#define AHEAD_MAX ((size_t)32 << 20)
#define GROWTH_DOUBLES_EVERY 8u          /* regions */

uint32_t uvas_page_shift;

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

uint64_t uvas_pages_now(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now); /* 4 ms or so: it decides about seconds */
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* ---- holes and their neighbours: under the lock ------------------------------------------------------------------------------------------------- */

static void set_state(struct uvas_run *run, enum uvas_run_state state) {
    atomic_store_explicit(&run->state, state, memory_order_release);
}

static void forget_run(struct uvas_run *run) {
    set_state(run, UVAS_RUN_NONE);
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

static void make_hole(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes) {
    uvas_run_place(run, region, base, bytes);
    set_state(run, UVAS_RUN_HOLE);
    uvas_region_mark(region, run, UVAS_RUN_HOLE);
    uvas_holes_add(&arena->holes, run);
}

/* A run that is nobody's joins the holes beside it. `run` describes the result, which is idle from now on. */
static void join(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes) {
    struct uvas_run *before = hole_at(region, base - 1), *after = hole_at(region, base + bytes);
    if (before) {
        uvas_holes_remove(&arena->holes, before);
        base = uvas_run_base(before);
        bytes += uvas_run_bytes(before);
        forget_run(before);
    }
    if (after) {
        uvas_holes_remove(&arena->holes, after);
        bytes += uvas_run_bytes(after);
        forget_run(after);
    }
    make_hole(arena, run, region, base, bytes);
    if (bytes >= UVAS_SPAN && !(arena->flags & UVAS_ARENA_BARE)) {
        uvas_holes_note_idle(&arena->holes, run, uvas_pages_now());
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
        make_hole(arena, rest, region, start, base - start);
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
        make_hole(arena, rest, region, base + bytes, end - base - bytes);
        if (idle_since && end - base - bytes >= UVAS_SPAN) {
            uvas_holes_note_idle(&arena->holes, rest, idle_since);
        }
        rest = NULL;
    }
    if (rest) {
        forget_run(rest);
    }
    uvas_run_place(run, region, base, bytes);
    set_state(run, UVAS_RUN_BUSY);
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
        set_state(run, UVAS_RUN_NONE);
    }
    join(arena, hole ? hole : run, region, base, bytes);
    return uvas_pages_idle(arena);
}

/* ---- memory ----------------------------------------------------------------------------------------------------------------------------------------- */

/* Spans [first, end) of a region, cut to it. */
static void span_range(const struct uvas_region *region, size_t first, size_t end, uintptr_t *base, uintptr_t *until) {
    uintptr_t start = atomic_load_explicit(&region->base, memory_order_relaxed);
    uintptr_t stop = start + atomic_load_explicit(&region->bytes, memory_order_relaxed), origin = start / UVAS_SPAN * UVAS_SPAN;
    *base = first == 0 ? start : origin + first * UVAS_SPAN;
    *until = origin + end * UVAS_SPAN < stop ? origin + end * UVAS_SPAN : stop;
}

static int commit_spans(const struct uvas_arena *arena, const struct uvas_region *region, size_t first, size_t end) {
    uintptr_t base, until;
    span_range(region, first, end, &base, &until);
    size_t offset = base - region->reservation_base, bytes = until - base;
    if (arena->pages == UVAS_PAGES_HUGE) {
        struct uvas_mapping mapping = {.descriptor = region->huge, .sharing = UVAS_SHARED, .offset = offset, .size = bytes,
                                       .descriptor_offset = (int64_t)(base - atomic_load_explicit(&region->base, memory_order_relaxed)),
                                       .protection = UVAS_READ | UVAS_WRITE};
        return uvas_map_fd_leased(region->reservation, &mapping);
    }
    int rc = uvas_commit(region->reservation, offset, bytes, UVAS_READ | UVAS_WRITE, 0);
    if (rc == 0 && arena->pages == UVAS_PAGES_TRANSPARENT) {
        (void)uvas_vm_advise_huge(base, bytes); /* a wish: what matters is that the memory is there */
    }
    if (rc == 0 && (arena->flags & UVAS_ARENA_BIND)) {
        rc = uvas_vm_bind(base, bytes, arena->node);
        if (rc < 0) {
            rc = uvas_fail_system(base, bytes, "mbind", rc);
            struct uvas_failure said = *uvas_last_failure();
            (void)uvas_decommit_leased(region->reservation, offset, bytes);
            *uvas_fail(said.kind, said.code) = said;
        }
    }
    return rc;
}

static int decommit_spans(const struct uvas_region *region, size_t first, size_t end) {
    uintptr_t base, until;
    span_range(region, first, end, &base, &until);
    int rc = uvas_decommit_leased(region->reservation, base - region->reservation_base, until - base);
    if (rc == 0 && region->huge >= 0) {
        rc = uvas_vm_punch(region->huge, (int64_t)(base - atomic_load_explicit(&region->base, memory_order_relaxed)), until - base);
    }
    return rc;
}

static void set_spans(struct uvas_region *region, size_t first, size_t end, enum uvas_span_state state) {
    memset(region->spans + first, (int)state, end - first);
}

static size_t bytes_of_spans(const struct uvas_region *region, size_t first, size_t end) {
    uintptr_t base, until;
    span_range(region, first, end, &base, &until);
    return until - base;
}

/* The spans from `first` on that are in a state, up to `end`. */
static size_t stretch(const struct uvas_region *region, size_t first, size_t end, enum uvas_span_state state) {
    while (first < end && region->spans[first] == state) {
        first++;
    }
    return first;
}

/* How far beyond `end` to commit in the same call. Under the lock. */
static size_t ahead(const struct uvas_arena *arena, const struct uvas_region *region, size_t end) {
    size_t bytes = arena->committed_bytes / AHEAD_SHARE < AHEAD_MAX ? arena->committed_bytes / AHEAD_SHARE : AHEAD_MAX;
    uintptr_t last = atomic_load_explicit(&region->base, memory_order_relaxed) + atomic_load_explicit(&region->bytes, memory_order_relaxed) - 1;
    size_t spans = uvas_span_index(region, last) + 1, until = end + bytes / UVAS_SPAN;
    bool scarce = arena->pages == UVAS_PAGES_HUGE || arena->limit;
    return scarce ? end : stretch(region, end, until < spans ? until : spans, UVAS_SPAN_NONE);
}

/* Memory behind a BUSY run. Under the lock, which it drops. */
static int back(struct uvas_arena *arena, const struct uvas_run *run, enum uvas_effort effort) {
    struct uvas_region *region = run->region;
    size_t at = uvas_span_index(region, uvas_run_base(run)), end = uvas_span_index(region, uvas_run_base(run) + uvas_run_bytes(run) - 1) + 1;
    bool more = true;
    while ((at = stretch(region, at, end, UVAS_SPAN_COMMITTED)) < end) {
        if (effort == UVAS_EFFORT_NO_WAIT) {
            return -EAGAIN;
        }
        if (region->spans[at] != UVAS_SPAN_NONE) { /* on its way, by another thread */
            (void)pthread_cond_wait(&arena->moved, &arena->lock);
            continue;
        }
        size_t until = stretch(region, at, end, UVAS_SPAN_NONE);
        until = more && until == end ? ahead(arena, region, until) : until;
        set_spans(region, at, until, UVAS_SPAN_COMMITTING);
        (void)pthread_mutex_unlock(&arena->lock);
        int rc = commit_spans(arena, region, at, until);
        (void)pthread_mutex_lock(&arena->lock);
        set_spans(region, at, until, rc == 0 ? UVAS_SPAN_COMMITTED : UVAS_SPAN_NONE);
        arena->committed_bytes += rc == 0 ? bytes_of_spans(region, at, until) : 0;
        (void)pthread_cond_broadcast(&arena->moved);
        if (rc < 0 && until <= end) {
            return rc;
        }
        more = rc == 0; /* not enough for what comes later: then for this */
    }
    return 0;
}

/* Under the lock, which it drops. */
static void zero(struct uvas_arena *arena, struct uvas_region *region, uintptr_t base, uintptr_t end) {
    while (base < end) {
        uintptr_t until;
        if (uvas_region_touched(region, base, end, &until)) {
            (void)pthread_mutex_unlock(&arena->lock);
            memset((void *)base, 0, until - base);
            (void)pthread_mutex_lock(&arena->lock);
        }
        base = until;
    }
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
        *rc = back(arena, run, request->effort);
        if (*rc < 0) {
            lack = *rc == -EAGAIN && !wait ? LACK_WAIT : LACK_MEMORY;
        } else {
            uintptr_t base = uvas_run_base(run), end = base + request->bytes, until;
            *touched = uvas_region_touched(run->region, base, end, &until) || until < end;
            if (request->zero && *touched) {
                zero(arena, run->region, base, end);
            }
            uvas_region_touch(run->region, base, request->bytes);
        }
    }
    (void)pthread_mutex_unlock(&arena->lock);
    if (spare) {
        uvas_metadata_give(UVAS_METADATA_RUN, spare);
    }
    return lack;
}

/* Another reservation of the arena's space. 0, or what is said. */
static int grow(const struct uvas_request *request) {
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
    bool allowed = !other && count < UVAS_REGIONS_MAX;
    arena->growing = allowed;
    (void)pthread_mutex_unlock(&arena->lock);
    if (!allowed) {
        return other ? 0 : -ENOSPC; /* 0: there is room now, perhaps */
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
        rc = uvas_pages_add_region(arena, got.id, got.base, got.size, true);
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

void uvas_pages_collect(struct uvas_arena *arena) {
    uvas_doors_shut(arena);
    (void)pthread_mutex_lock(&arena->lock);
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        uvas_heap_empty(heap);
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
        int grown = lack == LACK_ROOM ? grow(request) : -ENOSPC;
        if (grown == 0) {
            continue;
        }
        if (lack == LACK_ROOM && grown != -ENOSPC) {
            said = *uvas_last_failure(); /* a limit of the process, say: more to the point than that there is no room */
        }
        if (!collected) {
            collected = true;
            uvas_pages_unguard(arena);
            uvas_pages_collect(arena);
            continue;
        }
        if (lack == LACK_MEMORY && !trimmed) {
            trimmed = true;
            (void)uvas_pages_trim(arena, UINT64_MAX, SIZE_MAX);
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
        (void)uvas_pages_trim(arena, uvas_pages_now() - arena->idle_ns, 1);
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
        int rc = arena->flags & UVAS_ARENA_BARE ? 0 : back(arena, tail, UVAS_EFFORT_MODEST);
        if (rc == 0) {
            if (!(arena->flags & UVAS_ARENA_BARE)) {
                uvas_region_touch(run->region, end, more);
            }
            set_state(tail, UVAS_RUN_NONE);
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

/* ---- giving memory back -------------------------------------------------------------------------------------------------------------------------------- */

/* The spans [*first, *end) that lie in a run as a whole. */
static void whole_spans(const struct uvas_run *run, size_t *first, size_t *end) {
    const struct uvas_region *region = run->region;
    uintptr_t base = uvas_run_base(run), limit = base + uvas_run_bytes(run), start = atomic_load_explicit(&region->base, memory_order_relaxed);
    bool last = limit == start + atomic_load_explicit(&region->bytes, memory_order_relaxed);
    *first = uvas_span_index(region, base == start ? base : round_up(base, UVAS_SPAN));
    *end = uvas_span_index(region, limit - 1) + (last || limit % UVAS_SPAN == 0);
}

/* Whether one of them has memory. Under the lock. */
static bool backed(const struct uvas_run *run) {
    size_t at, end;
    whole_spans(run, &at, &end);
    while (at < end && run->region->spans[at] != UVAS_SPAN_COMMITTED) {
        at++;
    }
    return at < end;
}

/* Gives back the memory of whole spans in a BUSY run that was a hole. Under the lock, which it drops. */
static uint64_t unback(struct uvas_arena *arena, const struct uvas_run *run) {
    struct uvas_region *region = run->region;
    size_t at, end;
    uint64_t given = 0;
    whole_spans(run, &at, &end);
    for (; at < end; at++) {
        size_t until = stretch(region, at, end, UVAS_SPAN_COMMITTED);
        if (until == at) {
            continue;
        }
        set_spans(region, at, until, UVAS_SPAN_DECOMMITTING);
        (void)pthread_mutex_unlock(&arena->lock);
        int rc = decommit_spans(region, at, until);
        (void)pthread_mutex_lock(&arena->lock);
        set_spans(region, at, until, rc == 0 ? UVAS_SPAN_NONE : UVAS_SPAN_COMMITTED);
        (void)pthread_cond_broadcast(&arena->moved);
        if (rc == 0) {
            uintptr_t from, to;
            span_range(region, at, until, &from, &to);
            uvas_region_untouch(region, from, to - from);
            arena->committed_bytes -= to - from;
            given += to - from;
        }
        at = until - 1;
    }
    return given;
}

/* A hole that was BUSY is one again. Idle since `since` if it has memory: the kernel would not take it, or it came with a neighbour meanwhile. */
static void settle(struct uvas_arena *arena, struct uvas_run *run, uint64_t since) {
    join(arena, run, run->region, uvas_run_base(run), uvas_run_bytes(run));
    if (backed(run)) {
        uvas_holes_note_idle(&arena->holes, run, since);
    } else {
        uvas_holes_drop_idle(&arena->holes, run);
    }
}

/* Whoever gives memory back may come when the last block has gone and somebody closes the arena. Takes the lock; false: it is closed. */
static bool begin_giving(struct uvas_arena *arena) {
    (void)pthread_mutex_lock(&arena->lock);
    if (!arena->id) {
        (void)pthread_mutex_unlock(&arena->lock);
        return false;
    }
    arena->giving++;
    return true;
}

static void end_giving(struct uvas_arena *arena) {
    if (--arena->giving == 0) {
        (void)pthread_cond_broadcast(&arena->moved);
    }
    (void)pthread_mutex_unlock(&arena->lock);
}

void uvas_pages_unguard(struct uvas_arena *arena) {
    if (!begin_giving(arena)) {
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
    end_giving(arena);
}

uint64_t uvas_pages_trim(struct uvas_arena *arena, uint64_t until, size_t most) {
    uint64_t given = 0;
    if (!begin_giving(arena)) {
        return 0;
    }
    struct uvas_run *run;
    uint64_t now = uvas_pages_now();
    until = until < now ? until : now; /* what cannot be given back is tried once */
    while (most-- > 0 && (run = arena->holes.idle_first) && run->idle_since <= until) {
        uvas_holes_remove(&arena->holes, run);
        set_state(run, UVAS_RUN_BUSY);
        given += unback(arena, run);
        settle(arena, run, now + 1);
    }
    end_giving(arena);
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

uint64_t uvas_pages_empty(struct uvas_arena *arena) {
    uint64_t given = 0;
    if ((arena->flags & UVAS_ARENA_BARE) || !begin_giving(arena)) {
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
            if (touched || (uvas_run_state(run) == UVAS_RUN_HOLE && backed(run))) {
                uvas_holes_remove(&arena->holes, run);
                set_state(run, UVAS_RUN_BUSY);
                given += unback(arena, run);
                given += empty(arena, run);
                settle(arena, run, uvas_pages_now());
                at = uvas_run_base(run) + uvas_run_bytes(run); /* what was freed beside it meanwhile is in it now, and no boundary any more */
            }
        }
    }
    end_giving(arena);
    return given;
}

bool uvas_pages_next_committed(struct uvas_arena *arena, const struct uvas_region *region, uintptr_t *at, uintptr_t *until) {
    (void)pthread_mutex_lock(&arena->lock);
    uintptr_t base = atomic_load_explicit(&region->base, memory_order_relaxed), stop = base + atomic_load_explicit(&region->bytes, memory_order_relaxed);
    size_t first = *at && *at < stop ? uvas_span_index(region, *at) : 0, spans = uvas_span_index(region, stop - 1) + 1;
    first = *at < stop ? first : spans;
    while (first < spans && region->spans[first] != UVAS_SPAN_COMMITTED) {
        first++;
    }
    size_t end = stretch(region, first, spans, UVAS_SPAN_COMMITTED);
    if (first < spans) {
        span_range(region, first, end, at, until);
    }
    (void)pthread_mutex_unlock(&arena->lock);
    return first < spans;
}

/* ---- regions --------------------------------------------------------------------------------------------------------------------------------------------- */

static int open_huge(const struct uvas_arena *arena, struct uvas_region *region, size_t bytes) {
    if (arena->pages != UVAS_PAGES_HUGE) {
        return 0;
    }
    region->huge = uvas_vm_memfd_huge(arena->name, bytes);
    return region->huge < 0 ? uvas_fail_system(0, bytes, "memfd_create(MFD_HUGETLB)", region->huge) : 0;
}

int uvas_pages_add_region(struct uvas_arena *arena, uvas_id reservation, uintptr_t base, size_t size, bool ours) {
    uintptr_t start = base, end = base + size;
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
    rc = rc == 0 ? uvas_lease_region(reservation, !(arena->flags & UVAS_ARENA_BARE), region, &region->lease) : rc;
    if (rc < 0) {
        uvas_vm_close(region->huge);
        uvas_metadata_give(UVAS_METADATA_RUN, hole);
        uvas_region_give(region);
        return rc;
    }
    (void)pthread_mutex_lock(&arena->lock);
    arena->reserved_bytes += end - start;
    make_hole(arena, hole, region, start, end - start);
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    atomic_store_explicit(&arena->regions[count], region, memory_order_release);
    atomic_store_explicit(&arena->region_count, count + 1, memory_order_release);
    atomic_store_explicit(&region->arena_id, arena->id, memory_order_release);
    (void)pthread_mutex_unlock(&arena->lock);
    return 0;
}

int uvas_pages_drop_region(struct uvas_arena *arena, struct uvas_region *region) {
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
