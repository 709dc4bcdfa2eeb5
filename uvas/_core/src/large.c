/* large.c: blocks that are runs of their own, those that a thread keeps for its next one, and guards behind them. */
#include <errno.h>
#include <string.h>

#include "block.h"
#include "failure.h"
#include "vm.h"

#define VISITS 16u /* one in so many reads the clock */

/* ---- idle memory: whoever comes by on a slower way looks, now and then ------------------------------------------------------------------------------- */

/* Inside. true: somebody should trim. */
bool uvas_idle_come_by(struct uvas_heap *heap) {
    if (++heap->visits % VISITS) {
        return false;
    }
    (void)pthread_mutex_lock(&heap->arena->lock);
    bool idle = uvas_pages_idle(heap->arena);
    (void)pthread_mutex_unlock(&heap->arena->lock);
    return idle;
}

/* Outside, by the heap's thread. Who may not wait leaves it to its next call that may. */
void uvas_idle_see_to(struct uvas_heap *heap, bool wait) {
    heap->due = !wait;
    if (wait) {
        (void)uvas_trim_holes(heap->arena, uvas_pages_now() - heap->arena->idle_ns, 1);
    }
}

/* ---- large blocks ---------------------------------------------------------------------------------------------------------------------------------- */

/* What the heap kept. Inside. */
static struct uvas_run *take_kept(struct uvas_heap *heap, size_t bytes, size_t align) {
    for (uint32_t i = 0; i < UVAS_KEPT_RUNS; i++) {
        size_t kept = heap->kept_sizes[i];
        if (kept == bytes && !(uvas_run_base(heap->kept[i]) & (align - 1))) {
            struct uvas_run *run = heap->kept[i];
            heap->kept[i] = NULL;
            heap->kept_sizes[i] = 0;
            heap->kept_bytes -= kept;
            return run;
        }
    }
    return NULL;
}

/* Its memory goes to the arena. Inside. true: somebody should trim. */
static bool give(struct uvas_heap *heap, struct uvas_run *run) {
    (void)pthread_mutex_lock(&heap->arena->lock);
    bool idle = uvas_pages_give(heap->arena, run, NULL);
    (void)pthread_mutex_unlock(&heap->arena->lock);
    return idle;
}

/* Keeps a run that was just freed, in the place of the oldest. Inside. true: somebody should trim. */
static bool keep(struct uvas_heap *heap, struct uvas_run *run) {
    size_t bytes = uvas_run_bytes(run);
    bool idle = false;
    if (bytes > UVAS_KEPT_RUN_MAX) {
        return give(heap, run);
    }
    for (uint32_t tries = 0; tries < UVAS_KEPT_RUNS; tries++) {
        struct uvas_run **slot = &heap->kept[heap->kept_next];
        if (*slot && (tries == 0 || heap->kept_bytes + bytes > UVAS_KEPT_MAX)) {
            heap->kept_bytes -= uvas_run_bytes(*slot);
            idle |= give(heap, *slot);
            *slot = NULL;
            heap->kept_sizes[heap->kept_next] = 0;
        }
        if (!*slot && heap->kept_bytes + bytes <= UVAS_KEPT_MAX) {
            *slot = run;
            heap->kept_sizes[heap->kept_next] = bytes;
            heap->kept_bytes += bytes;
            heap->kept_next = (heap->kept_next + 1) % UVAS_KEPT_RUNS;
            return uvas_idle_come_by(heap) || idle;
        }
        heap->kept_next = (heap->kept_next + 1) % UVAS_KEPT_RUNS;
    }
    return give(heap, run) || idle;
}

static int put_guard(struct uvas_arena *arena, struct uvas_run *run) {
    size_t guard = uvas_page(), usable = uvas_run_bytes(run) - guard;
    int rc = uvas_vm_guard(uvas_run_base(run) + usable, guard);
    if (rc < 0) {
        (void)pthread_mutex_lock(&arena->lock);
        (void)uvas_pages_give(arena, run, NULL);
        (void)pthread_mutex_unlock(&arena->lock);
        return rc == -EINVAL || rc == -ENOTSUP
                   ? uvas_fail_unsupported("guard pages", "an arena without guards", "this kernel puts no guards into memory of this kind")
                   : uvas_fail_system(uvas_run_base(run) + usable, guard, "madvise(MADV_GUARD_INSTALL)", rc);
    }
    atomic_store_explicit(&run->guard, guard, memory_order_relaxed);
    return 0;
}

/* A fresh run. Outside. */
static int take_run(struct uvas_heap *heap, const struct uvas_ask *ask, size_t bytes, enum uvas_effort effort, struct uvas_run **out) {
    bool touched;
    struct uvas_arena *arena = heap->arena;
    struct uvas_run *run = uvas_metadata_take(UVAS_METADATA_RUN, ask->wait);
    if (!run) {
        return ask->wait ? uvas_fail_memory(0, sizeof *run, "the host") : -EAGAIN;
    }
    struct uvas_request request = {.arena = arena, .id = ask->id, .asked = ask->size, .bytes = bytes, .zero = ask->zero,
                                   .align = ask->align > uvas_page() ? ask->align : uvas_page(),
                                   .effort = ask->wait ? effort : UVAS_EFFORT_NO_WAIT};
    int rc = uvas_pages_take(&request, &run, &touched);
    if (rc < 0) {
        if (run) {
            uvas_metadata_give(UVAS_METADATA_RUN, run);
        }
        return rc;
    }
    atomic_store_explicit(&run->guard, 0, memory_order_relaxed);
    *out = run;
    return (arena->flags & UVAS_ARENA_GUARD) && ask->size > UVAS_GUARDED_LEAST ? put_guard(arena, run) : 0;
}

int uvas_large_alloc(struct uvas_heap *heap, const struct uvas_ask *ask, uintptr_t *out) {
    if (ask->size >> uvas_vm_platform.address_bits) {
        return ask->wait ? uvas_fail_invalid("a block of 0x%zx bytes is larger than all addresses, which have %u bits", ask->size,
                                             uvas_vm_platform.address_bits)
                         : -EAGAIN;
    }
    bool guarded = (heap->hardened & UVAS_ARENA_GUARD) && ask->size > UVAS_GUARDED_LEAST;
    size_t least = uvas_block_pages(ask->size) + (guarded ? uvas_page() : 0), bytes = guarded ? least : uvas_block_steps(ask->size);
    if (guarded && !ask->wait) {
        return -EAGAIN;
    }
    int rc = uvas_heap_go_in(heap, ask->id, ask->wait);
    if (rc < 0) {
        return rc;
    }
    struct uvas_run *run = guarded || bytes > UVAS_KEPT_RUN_MAX ? NULL : take_kept(heap, bytes, ask->align);
    if (!run) {
        uvas_heap_leave(heap); /* nobody waits for the kernel inside */
        rc = take_run(heap, ask, bytes, bytes == least ? UVAS_EFFORT_FULL : UVAS_EFFORT_MODEST, &run);
        if (rc < 0 && rc != -EAGAIN && bytes != least) {
            rc = take_run(heap, ask, least, UVAS_EFFORT_FULL, &run);
        }
        if (rc < 0) {
            return rc;
        }
        while (!uvas_heap_enter(heap, ask->id) && !uvas_heap_enter_fenced(heap)) { /* the arena cannot close: it has a busy run */
            uvas_heap_wait_at_door(heap);
        }
    } else if (ask->zero) {
        memset((void *)uvas_run_base(run), 0, bytes);
    }
    heap->large_blocks++;
    heap->large_bytes += uvas_run_bytes(run) - atomic_load_explicit(&run->guard, memory_order_relaxed);
    *out = uvas_run_base(run);
    atomic_store_explicit(&run->state, UVAS_RUN_LARGE, memory_order_release);
    uvas_heap_leave(heap);
    return 0;
}

/* ---- free ---------------------------------------------------------------------------------------------------- */

int uvas_large_free(struct uvas_heap *heap, struct uvas_run *run) {
    uint32_t live = UVAS_RUN_LARGE;
    bool guarded = atomic_load_explicit(&run->guard, memory_order_relaxed) != 0;
    if (!atomic_compare_exchange_strong(&run->state, &live, guarded ? UVAS_RUN_BUSY : UVAS_RUN_KEPT)) {
        return -EINVAL;
    }
    return guarded ? UVAS_WANTS_OUTSIDE : keep(heap, run) ? UVAS_GIVE_IDLE : 0;
}

/* The guard comes down before the pages are anybody else's. Outside; the run is BUSY. */
void uvas_large_free_guarded(struct uvas_arena *arena, struct uvas_run *run) {
    size_t guard = atomic_load_explicit(&run->guard, memory_order_relaxed);
    int rc = uvas_vm_unguard(uvas_run_base(run) + uvas_run_bytes(run) - guard, guard);
    (void)pthread_mutex_lock(&arena->lock);
    bool others = rc == 0 && arena->stuck;
    if (rc == 0) {
        (void)uvas_pages_give(arena, run, NULL);
    } else { /* free all the same: the pages wait for a kernel that takes it */
        run->next = arena->stuck;
        arena->stuck = run;
        atomic_store_explicit(&run->state, UVAS_RUN_KEPT, memory_order_release);
    }
    (void)pthread_mutex_unlock(&arena->lock);
    if (others) {
        uvas_trim_guards(arena);
    }
}

