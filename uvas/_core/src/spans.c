/* spans.c: the memory behind an arena's addresses, in spans of 2 MiB: committed before the first of their pages is handed out, given back when none is.
 * A span on its way, either way, is waited for by whoever needs it too; no lock is held meanwhile. */
#include <errno.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "space.h"
#include "vm.h"

#define AHEAD_SHARE 8u /* of what is committed already is committed in advance, so that calls get rarer as an arena grows */
#define AHEAD_MAX ((size_t)32 << 20)

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* Spans [first, end) of a region, cut to it. */
static void span_range(const struct uvas_region *region, size_t first, size_t end, uintptr_t *base, uintptr_t *until) {
    uintptr_t start = atomic_load_explicit(&region->base, memory_order_relaxed);
    uintptr_t stop = start + atomic_load_explicit(&region->bytes, memory_order_relaxed), origin = start / UVAS_SPAN * UVAS_SPAN;
    *base = first == 0 ? start : origin + first * UVAS_SPAN;
    *until = origin + end * UVAS_SPAN < stop ? origin + end * UVAS_SPAN : stop;
}

/* Where a device takes memory back only as it was committed, each span is committed by itself: so it can be given back. */
static int commit_memory(const struct uvas_region *region, uintptr_t base, uintptr_t until) {
    bool whole = uvas_party_whole(region->reservation);
    uintptr_t at = base;
    int rc = 0;
    while (rc == 0 && at < until) {
        uintptr_t next = (at / UVAS_SPAN + 1) * UVAS_SPAN;
        next = !whole || next > until ? until : next;
        rc = uvas_commit_leased(region->reservation, at - region->reservation_base, next - at);
        at = rc == 0 ? next : at;
    }
    if (rc < 0 && at > base) {
        struct uvas_failure said = *uvas_last_failure();
        (void)uvas_decommit_leased(region->reservation, base - region->reservation_base, at - base);
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
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
    int rc = commit_memory(region, base, until);
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

/* *clean: what is committed there next reads as zeros. */
static int decommit_spans(const struct uvas_region *region, size_t first, size_t end, bool *clean) {
    uintptr_t base, until;
    span_range(region, first, end, &base, &until);
    int rc = uvas_decommit_leased(region->reservation, base - region->reservation_base, until - base);
    *clean = rc == 0;
    if (rc == 0 && region->huge >= 0) {
        *clean = uvas_vm_punch(region->huge, (int64_t)(base - atomic_load_explicit(&region->base, memory_order_relaxed)), until - base) == 0;
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
int uvas_spans_back(struct uvas_arena *arena, const struct uvas_run *run, enum uvas_effort effort) {
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
void uvas_spans_zero(struct uvas_arena *arena, struct uvas_region *region, uintptr_t base, uintptr_t end) {
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

/* The spans [*first, *end) that lie in a run as a whole. */
static void whole_spans(const struct uvas_run *run, size_t *first, size_t *end) {
    const struct uvas_region *region = run->region;
    uintptr_t base = uvas_run_base(run), limit = base + uvas_run_bytes(run), start = atomic_load_explicit(&region->base, memory_order_relaxed);
    bool last = limit == start + atomic_load_explicit(&region->bytes, memory_order_relaxed);
    *first = uvas_span_index(region, base == start ? base : round_up(base, UVAS_SPAN));
    *end = uvas_span_index(region, limit - 1) + (last || limit % UVAS_SPAN == 0);
}

/* Whether one of them has memory. Under the lock. */
bool uvas_spans_backed(const struct uvas_run *run) {
    size_t at, end;
    whole_spans(run, &at, &end);
    while (at < end && run->region->spans[at] != UVAS_SPAN_COMMITTED) {
        at++;
    }
    return at < end;
}

/* Gives back the memory of whole spans in a BUSY run that was a hole. Under the lock, which it drops. */
uint64_t uvas_spans_unback(struct uvas_arena *arena, const struct uvas_run *run) {
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
        bool clean;
        int rc = decommit_spans(region, at, until, &clean);
        (void)pthread_mutex_lock(&arena->lock);
        set_spans(region, at, until, rc == 0 ? UVAS_SPAN_NONE : UVAS_SPAN_COMMITTED);
        (void)pthread_cond_broadcast(&arena->moved);
        if (rc == 0) {
            uintptr_t from, to;
            span_range(region, at, until, &from, &to);
            if (clean) {
                uvas_region_untouch(region, from, to - from);
            }
            arena->committed_bytes -= to - from;
            given += to - from;
        }
        at = until - 1;
    }
    return given;
}

bool uvas_spans_next(struct uvas_arena *arena, const struct uvas_region *region, uintptr_t *at, uintptr_t *until) {
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
