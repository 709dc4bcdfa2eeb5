/* block.c: blocks allocated and freed.
 *
 * The short ways first: a small block from the slab that the thread's heap takes from, or back to a slab that it owns, touches nothing that another
 * thread writes. Everything else is a slower way that ends in one of those.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "arena.h"
#include "failure.h"
#include "space.h"
#include "vm.h"

#define POISON 0xdf
#define ALIGN_LEAST ((size_t)16)
#define GUARDED_LEAST ((size_t)64 << 10) /* in an arena with guards larger blocks have pages of their own, and a guard */
#define LOOKS 1000u /* at a slab whose owner is collecting, which takes as long as a few of them */
#define VISITS 16u /* one in so many reads the clock */

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define QUICK static inline __attribute__((always_inline))
#define SLOW __attribute__((noinline)) /* kept out of the short ways, which then need no stack */

struct ask { /* what a caller wants */
    uvas_id id;
    size_t size, align;
    bool zero, wait;
};

/* ---- small blocks: inside ------------------------------------------------------------------------------------------------------------------------- */

/* The lowest free block of a slab that has one. */
QUICK uintptr_t take(struct uvas_slab *slab) {
    uint32_t word = (uint32_t)__builtin_ctzll(slab->summary);
    uint64_t bits = atomic_load_explicit(&uvas_slab_free(slab)[word], memory_order_relaxed), rest = bits & (bits - 1);
    uint32_t index = 64 * word + (uint32_t)__builtin_ctzll(bits);
    atomic_store_explicit(&uvas_slab_free(slab)[word], rest, memory_order_relaxed);
    if (!LIKELY(rest != 0)) {
        slab->summary &= slab->summary - 1;
    }
    slab->counts += UVAS_SLAB_ONE;
    if (!LIKELY(index < slab->high)) {
        slab->high = index + 1;
    }
    return uvas_run_base(&slab->run) + (uintptr_t)index * atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed);
}

/* The first slab in a bin's list that has a free block; those before it are full, and go to the other list. */
static struct uvas_slab *first_with_room(struct uvas_bin *bin) {
    while (bin->free && !bin->free->summary) {
        struct uvas_slab *slab = bin->free;
        uvas_slab_unlist(&bin->free, slab);
        uvas_slab_list(&bin->full, slab);
        slab->listed = false;
    }
    return bin->free;
}

/* A slab of the heap's own with a free block, first in its list; or NULL. What others freed is collected when there is nothing else: the later, the more
 * comes at once. */
static struct uvas_slab *refill(struct uvas_heap *heap, uint32_t class) {
    struct uvas_bin *bin = &heap->bins[class];
    if (!first_with_room(bin) && atomic_load_explicit(&heap->pending, memory_order_relaxed)) {
        uvas_heap_collect(heap);
    }
    if (!first_with_room(bin)) {
        (void)pthread_mutex_lock(&heap->arena->lock);
        (void)uvas_slab_find_orphan(heap, class);
        (void)pthread_mutex_unlock(&heap->arena->lock);
    }
    return bin->free;
}

/* Goes inside; 0, -EAGAIN, or -ESTALE said. */
static int go_in(struct uvas_heap *heap, uvas_id id, bool wait) {
    while (!uvas_heap_enter(heap) && !uvas_heap_enter_fenced(heap)) {
        if (!wait) {
            return -EAGAIN;
        }
        uvas_heap_wait_at_door(heap);
    }
    if (atomic_load_explicit(&heap->arena_id, memory_order_relaxed) != id) {
        uvas_heap_leave(heap);
        return wait ? uvas_fail_released("arena", id) : -EAGAIN;
    }
    return 0;
}

/* ---- idle memory: whoever comes by on a slower way looks, now and then ------------------------------------------------------------------------------- */

/* Inside. true: somebody should trim. */
static bool comes_by(struct uvas_heap *heap) {
    if (++heap->visits % VISITS) {
        return false;
    }
    (void)pthread_mutex_lock(&heap->arena->lock);
    bool idle = uvas_pages_idle(heap->arena);
    (void)pthread_mutex_unlock(&heap->arena->lock);
    return idle;
}

/* Outside, by the heap's thread. Who may not wait leaves it to its next call that may. */
static void see_to_idle(struct uvas_heap *heap, bool wait) {
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
            return comes_by(heap) || idle;
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
static int take_run(struct uvas_heap *heap, const struct ask *ask, size_t bytes, enum uvas_effort effort, struct uvas_run **out) {
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
    return (arena->flags & UVAS_ARENA_GUARD) && ask->size > GUARDED_LEAST ? put_guard(arena, run) : 0;
}

static int alloc_large(struct uvas_heap *heap, const struct ask *ask, uintptr_t *out) {
    if (ask->size >> uvas_vm_platform.address_bits) {
        return ask->wait ? uvas_fail_invalid("a block of 0x%zx bytes is larger than all addresses, which have %u bits", ask->size,
                                             uvas_vm_platform.address_bits)
                         : -EAGAIN;
    }
    bool guarded = (heap->hardened & UVAS_ARENA_GUARD) && ask->size > GUARDED_LEAST;
    size_t least = uvas_block_pages(ask->size) + (guarded ? uvas_page() : 0), bytes = guarded ? least : uvas_block_steps(ask->size);
    if (guarded && !ask->wait) {
        return -EAGAIN;
    }
    int rc = go_in(heap, ask->id, ask->wait);
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
        while (!uvas_heap_enter(heap) && !uvas_heap_enter_fenced(heap)) { /* the arena cannot close: it has a busy run */
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

/* ---- alloc ----------------------------------------------------------------------------------------------------------------------------------------- */

/* A slab for one more block. 0, or what is said or -EAGAIN. Outside. */
static int add_slab(struct uvas_heap *heap, const struct ask *ask, uint32_t class) {
    struct uvas_slab *slab;
    int rc = uvas_slab_make(heap->arena, ask->id, class, ask->wait ? UVAS_EFFORT_MODEST : UVAS_EFFORT_NO_WAIT, &slab);
    if (rc == 0) {
        while (!uvas_heap_enter(heap) && !uvas_heap_enter_fenced(heap)) { /* the arena cannot close: it has a busy run */
            uvas_heap_wait_at_door(heap);
        }
        uvas_slab_adopt(heap, slab);
        uvas_heap_leave(heap);
    }
    return rc;
}

/* Where there is no room for a slab: what threads keep is called in, which may bring a slab with a free block; then the block is a run of its own. */
static int alloc_small(struct uvas_heap *heap, const struct ask *ask, uint32_t class, uintptr_t *out) {
    for (bool collected = false;;) {
        int rc = go_in(heap, ask->id, ask->wait);
        if (rc < 0) {
            return rc;
        }
        struct uvas_slab *slab = refill(heap, class);
        if (slab) {
            uint32_t high = slab->high;
            size_t bytes = uvas_class_bytes(class);
            *out = take(slab);
            bool fresh = slab->clean && slab->high > high; /* never handed out before, so zero */
            bool idle = comes_by(heap);
            uvas_heap_leave(heap);
            if (idle) {
                see_to_idle(heap, ask->wait);
            }
            if (ask->zero && !fresh) {
                memset((void *)*out, 0, bytes);
            }
            return 0;
        }
        uvas_heap_leave(heap);
        rc = add_slab(heap, ask, class);
        if (rc == 0) {
            continue;
        }
        if (!ask->wait || rc == -ESTALE) {
            return rc == -ESTALE ? rc : -EAGAIN;
        }
        if (collected) {
            return alloc_large(heap, ask, out);
        }
        uvas_pages_collect(heap->arena);
        collected = true;
    }
}

/* The class of which a block is aligned so; UVAS_CLASSES: none, it is to be whole pages. */
static uint32_t class_for(size_t size, size_t align) {
    if (size > UVAS_SMALL_MAX || align > uvas_page()) {
        return UVAS_CLASSES;
    }
    uint32_t class = uvas_class_of(size > align ? size : align);
    while (class < UVAS_CLASSES && (uvas_class_bytes(class) & (align - 1))) {
        class++;
    }
    return class;
}

static int try_alloc(struct uvas_heap *heap, const struct ask *ask, uintptr_t *out) {
    bool guarded = (heap->hardened & UVAS_ARENA_GUARD) && ask->size > GUARDED_LEAST;
    uint32_t class = guarded ? UVAS_CLASSES : class_for(ask->size, ask->align);
    return class < UVAS_CLASSES ? alloc_small(heap, ask, class, out) : alloc_large(heap, ask, out);
}

/* How uvas_alloc and its kin differ. */
enum { ZERO = 1, NO_WAIT = 2 };

SLOW static int alloc_any(uvas_id id, size_t size, size_t align, unsigned how, uintptr_t *out) {
    struct ask ask = {.id = id, .size = size, .align = align > ALIGN_LEAST ? align : ALIGN_LEAST, .zero = how & ZERO, .wait = !(how & NO_WAIT)};
    if (size == 0 || (align & (align - 1)) || align > UVAS_ALIGN_MAX) {
        return uvas_fail_invalid("%zu bytes aligned to 0x%zx: a block has at least 1 byte, alignments are powers of two up to 0x%zx", size, align,
                                 UVAS_ALIGN_MAX);
    }
    int rc;
    struct uvas_heap *heap = uvas_heap_of(id, ask.wait, &rc);
    if (!heap) {
        return rc;
    }
    if (ask.zero && (heap->arena->flags & UVAS_ARENA_BARE)) {
        return uvas_fail_invalid("an arena of bare addresses has no bytes to zero");
    }
    if (heap->due) {
        if (!ask.wait) {
            return -EAGAIN;
        }
        see_to_idle(heap, true);
    }
    rc = try_alloc(heap, &ask, out);
    if ((rc == -ENOMEM || rc == -ENOSPC || rc == -EDQUOT) && heap->arena->exhausted) {
        struct uvas_failure said = *uvas_last_failure();
        if (heap->arena->exhausted(heap->arena->context, size) == 1) {
            return try_alloc(heap, &ask, out);
        }
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
}

QUICK int alloc(uvas_id id, size_t size, size_t align, unsigned how, uintptr_t *out) {
    struct uvas_heap *heap = uvas_thread.last;
    if (LIKELY(heap && size - 1 < UVAS_SMALL_MAX && (align == 0 || align == ALIGN_LEAST) && uvas_heap_enter(heap))) {
        struct uvas_bin *bin = &heap->bins[uvas_class_of(size)];
        struct uvas_slab *slab = bin->free;
        if (LIKELY(slab && slab->summary && !(how & ZERO & heap->bare) && atomic_load_explicit(&heap->arena_id, memory_order_relaxed) == id)) {
            bool clean = slab->clean;
            uint32_t high = slab->high;
            uintptr_t base = take(slab);
            clean = clean && slab->high > high; /* never handed out before, so zero */
            size_t bytes = atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed);
            uvas_heap_leave(heap);
            if ((how & ZERO) && !clean) {
                memset((void *)base, 0, bytes);
            }
            *out = base;
            return 0;
        }
        uvas_heap_leave(heap);
    }
    return alloc_any(id, size, align, how, out);
}

int uvas_alloc(uvas_id arena, size_t size, size_t align, uintptr_t *out) {
    return alloc(arena, size, align, 0, out);
}

int uvas_alloc_zeroed(uvas_id arena, size_t size, size_t align, uintptr_t *out) {
    return alloc(arena, size, align, ZERO, out);
}

int uvas_alloc_try(uvas_id arena, size_t size, size_t align, uintptr_t *out) {
    return alloc(arena, size, align, NO_WAIT, out);
}

int uvas_alloc_many(uvas_id arena, const size_t *sizes, size_t count, uintptr_t *out) {
    for (size_t i = 0; i < count; i++) {
        int rc = alloc(arena, sizes[i], 0, 0, &out[i]);
        if (rc < 0) {
            struct uvas_failure said = *uvas_last_failure();
            while (i-- > 0) {
                (void)uvas_free(arena, out[i]);
            }
            *uvas_fail(said.kind, said.code) = said;
            return rc;
        }
    }
    return 0;
}

/* ---- free -------------------------------------------------------------------------------------------------------------------------------------------- */

enum { GIVE_IDLE = 1, WANTS_OUTSIDE = 2 }; /* answers of free_inside that are no failures */

/* The block is free after our bit was set: its owner has collected the bit, or has freed the block at the same time. Then the bit stays on a block that is
 * free, and is taken back here. While the owner is collecting, both bits say nothing. */
SLOW static bool freed_twice(struct uvas_slab *slab, _Atomic uint64_t *free, _Atomic uint64_t *remote, uint64_t bit) {
    for (uint32_t tries = 0; tries < LOOKS; tries++) {
        uint32_t collects = atomic_load(&slab->run.collects);
        if (!(atomic_load(free) & atomic_load(remote) & bit)) {
            return false;
        }
        if (!(collects & 1) && atomic_load(&slab->run.collects) == collects) {
            (void)atomic_fetch_and(remote, ~bit);
            return true;
        }
    }
    return false; /* the owner sleeps in the middle: it will find the bit, and count it */
}

/* By a thread that does not own the slab. */
SLOW static int free_remote(struct uvas_slab *slab, size_t index) {
    uint64_t bit = UINT64_C(1) << index % 64;
    _Atomic uint64_t *remote = &uvas_slab_remote(slab)[index / 64], *free = &uvas_slab_free(slab)[index / 64];
    /* In this order, the opposite of the owner's when it collects: an earlier free is in the one or in the other at each moment. */
    uint64_t freed = atomic_load(remote);
    freed |= atomic_load(free);
    if (freed & bit || atomic_fetch_or(remote, bit) & bit) {
        return -EINVAL;
    }
    if (!LIKELY(!(atomic_load(free) & bit)) && freed_twice(slab, free, remote, bit)) {
        return -EINVAL;
    }
    uvas_slab_notify(slab);
    return 0;
}

QUICK int free_small(struct uvas_heap *heap, struct uvas_slab *slab, size_t offset) {
    size_t index = uvas_slab_index(slab, offset);
    if (!LIKELY(index < atomic_load_explicit(&slab->run.count, memory_order_relaxed) &&
                index * atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed) == offset)) {
        return -EINVAL; /* also where the slab is elsewhere now */
    }
    if (!LIKELY(atomic_load_explicit(&slab->run.owner, memory_order_relaxed) == heap)) {
        return free_remote(slab, index);
    }
    uint64_t word = index / 64, bit = UINT64_C(1) << index % 64, bits = atomic_load_explicit(&uvas_slab_free(slab)[word], memory_order_relaxed);
    uint64_t freed = bits;
    if (!LIKELY(!atomic_load_explicit(&slab->run.pending, memory_order_acquire))) { /* else all that others have freed has been collected */
        freed |= atomic_load_explicit(&uvas_slab_remote(slab)[word], memory_order_acquire);
    }
    if (!LIKELY(!(freed & bit))) {
        return -EINVAL;
    }
    atomic_store_explicit(&uvas_slab_free(slab)[word], bits | bit, memory_order_release);
    slab->summary |= UINT64_C(1) << word;
    if (!LIKELY(slab->listed && ((--slab->counts & UVAS_SLAB_USED) || (!slab->next && !slab->previous)))) {
        slab->counts -= !slab->listed;
        uvas_slab_changed(heap, slab);
    }
    return 0;
}

SLOW static int free_large(struct uvas_heap *heap, struct uvas_run *run) {
    uint32_t live = UVAS_RUN_LARGE;
    bool guarded = atomic_load_explicit(&run->guard, memory_order_relaxed) != 0;
    if (!atomic_compare_exchange_strong(&run->state, &live, guarded ? UVAS_RUN_BUSY : UVAS_RUN_KEPT)) {
        return -EINVAL;
    }
    return guarded ? WANTS_OUTSIDE : keep(heap, run) ? GIVE_IDLE : 0;
}

/* In a region that is not the one where the last block was. Inside. */
SLOW static bool look_around(struct uvas_heap *heap, uintptr_t address) {
    struct uvas_region *region = uvas_arena_region(heap->arena, address);
    if (region) {
        heap->near_base = atomic_load_explicit(&region->base, memory_order_relaxed);
        heap->near_bytes = atomic_load_explicit(&region->bytes, memory_order_relaxed);
        heap->near_map = region->map;
    }
    return region != NULL;
}

/* A large block; or a slab's that the page's own pointer did not lead to, as that may be an old one. Inside. */
SLOW static int free_other(struct uvas_heap *heap, uintptr_t address, struct uvas_run **found) {
    const struct uvas_region *region = uvas_arena_region(heap->arena, address);
    struct uvas_run *run = region ? uvas_region_find(region, address) : NULL;
    uint32_t state = run ? uvas_run_state(run) : UVAS_RUN_NONE;
    if (state == UVAS_RUN_SLAB) {
        return free_small(heap, (struct uvas_slab *)run, address - uvas_run_base(run));
    }
    *found = run;
    return state == UVAS_RUN_LARGE && address == uvas_run_base(run) ? free_large(heap, run) : -EINVAL;
}

/* 0, GIVE_IDLE, WANTS_OUTSIDE with *found, or -EINVAL. */
QUICK int free_inside(struct uvas_heap *heap, uintptr_t address, struct uvas_run **found) {
    if (!LIKELY(address - heap->near_base < heap->near_bytes) && !look_around(heap, address)) {
        return -EINVAL;
    }
    size_t page = (address - heap->near_base) >> uvas_page_shift;
    struct uvas_run *run = atomic_load_explicit(&heap->near_map[page], memory_order_acquire);
    if (LIKELY(run && uvas_run_state(run) == UVAS_RUN_SLAB)) {
        int rc = free_small(heap, (struct uvas_slab *)run, address - uvas_run_base(run));
        return LIKELY(rc != -EINVAL) ? rc : free_other(heap, address, found);
    }
    if (run && uvas_run_state(run) == UVAS_RUN_LARGE && address == uvas_run_base(run)) {
        *found = run;
        return free_large(heap, run);
    }
    return free_other(heap, address, found);
}

/* The guard comes down before the pages are anybody else's. Outside; the run is BUSY. */
static int free_guarded(struct uvas_arena *arena, struct uvas_run *run) {
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
    return 0;
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

SLOW static int free_any(uvas_id id, uintptr_t address, bool wait);

/* What is left to do outside. */
SLOW static int free_ends(struct uvas_heap *heap, int rc, uvas_id id, uintptr_t address, bool wait) {
    if (rc == GIVE_IDLE) {
        see_to_idle(heap, wait);
    }
    return rc == -EINVAL ? uvas_block_not_live(address) : rc == -ESTALE ? free_any(id, address, wait) : 0;
}

SLOW static int free_any(uvas_id id, uintptr_t address, bool wait) {
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
    rc = go_in(heap, id, wait);
    if (rc < 0) {
        return rc;
    }
    rc = free_inside(heap, address, &run);
    uvas_heap_leave(heap);
    return rc == WANTS_OUTSIDE ? free_guarded(arena, run) : free_ends(heap, rc, id, address, wait);
}

QUICK int free_block(uvas_id id, uintptr_t address, bool wait) {
    struct uvas_heap *heap = uvas_thread.last;
    if (!LIKELY(heap && uvas_heap_enter(heap))) {
        return free_any(id, address, wait);
    }
    int rc = -ESTALE;
    struct uvas_run *run;
    if (LIKELY(atomic_load_explicit(&heap->arena_id, memory_order_relaxed) == id)) {
        rc = free_inside(heap, address, &run);
    }
    uvas_heap_leave(heap);
    return LIKELY(rc == 0) ? 0 : free_ends(heap, rc, id, address, wait);
}

int uvas_free(uvas_id arena, uintptr_t address) {
    return free_block(arena, address, true);
}

int uvas_free_try(uvas_id arena, uintptr_t address) {
    return free_block(arena, address, false);
}

