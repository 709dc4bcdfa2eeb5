/* census.c: what an arena holds, counted and checked run by run, while every thread is outside. */
#include <errno.h>

#include "arena.h"
#include "failure.h"
#include "vm.h"

static void reopen(struct uvas_arena *arena) {
    (void)pthread_mutex_unlock(&arena->lock);
    uvas_doors_open(arena);
}

/* The arena with this id, all threads outside and the lock held; NULL and it is said: dead, perhaps since a moment. */
static struct uvas_arena *shut(uvas_id id) {
    struct uvas_arena *arena = uvas_arena_get(id);
    if (arena) {
        uvas_doors_shut(arena);
        (void)pthread_mutex_lock(&arena->lock);
    }
    if (arena && arena->id != id) {
        reopen(arena);
        (void)uvas_fail_released("arena", id);
        arena = NULL;
    }
    return arena;
}

struct walk {
    const struct uvas_arena *arena;
    uint32_t region;
    uintptr_t address;
};

static struct uvas_run *next_run(struct walk *walk) {
    while (walk->region < atomic_load_explicit(&walk->arena->region_count, memory_order_relaxed)) {
        const struct uvas_region *region = atomic_load_explicit(&walk->arena->regions[walk->region], memory_order_relaxed);
        uintptr_t base = atomic_load_explicit(&region->base, memory_order_relaxed);
        uintptr_t stop = base + atomic_load_explicit(&region->bytes, memory_order_relaxed);
        uintptr_t at = walk->address ? walk->address : base;
        if (at < stop) {
            struct uvas_run *run = uvas_region_find(region, at);
            walk->address = run ? uvas_run_base(run) + uvas_run_bytes(run) : stop;
            return run;
        }
        walk->region++;
        walk->address = 0;
    }
    return NULL;
}

static uint32_t live_in(struct uvas_slab *slab) {
    uint32_t live = (slab->used & ~UVAS_SLAB_UNLISTED) - uvas_slab_known(slab);
    for (size_t group = 0; group < slab->run.groups; group++) {
        live -= (uint32_t)__builtin_popcountll(uvas_slab_group(slab, group, UVAS_BLOCK_FREED));
    }
    return live;
}

/* Blocks that live, and runs at work. */
uint64_t uvas_arena_in_use(const struct uvas_arena *arena) {
    struct walk walk = {.arena = arena};
    uint64_t blocks = 0;
    for (struct uvas_run *run = next_run(&walk); run; run = next_run(&walk)) {
        uint32_t state = uvas_run_state(run);
        blocks += state == UVAS_RUN_SLAB ? live_in((struct uvas_slab *)run) : state == UVAS_RUN_LARGE || state == UVAS_RUN_BUSY;
    }
    return blocks;
}

static void count_run(struct uvas_run *run, struct uvas_arena_stats *stats) {
    uint32_t state = uvas_run_state(run);
    size_t bytes = uvas_run_bytes(run);
    stats->metadata_bytes += uvas_metadata_bytes(UVAS_METADATA_RUN);
    if (state == UVAS_RUN_SLAB) {
        struct uvas_slab *slab = (struct uvas_slab *)run;
        uint32_t live = live_in(slab);
        stats->live_blocks += live;
        stats->live_bytes += (uint64_t)live * uvas_class_bytes(slab->class);
        stats->cached_bytes += live ? 0 : bytes;
        stats->metadata_bytes += uvas_metadata_bytes(uvas_slab_kind(atomic_load_explicit(&slab->run.count, memory_order_relaxed))); /* the run was its spare */
    } else if (state == UVAS_RUN_LARGE) {
        stats->live_blocks++;
        stats->live_bytes += bytes - atomic_load_explicit(&run->guard, memory_order_relaxed);
    } else if (state == UVAS_RUN_KEPT) {
        stats->cached_bytes += bytes;
    }
}

static void count_heaps(struct uvas_arena *arena, struct uvas_arena_stats *stats) {
    for (struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        uvas_heap_count(heap);
        stats->metadata_bytes += sizeof *heap;
        stats->threads += !heap->idle;
    }
    uvas_heap_count(&arena->orphans);
    uvas_heap_count(&arena->resting);
    stats->total_blocks = arena->ended_blocks;
    stats->total_bytes = arena->ended_bytes;
}

static uint64_t resident(uintptr_t from, uintptr_t to) {
    uint64_t bytes = 0;
    return uvas_vm_resident(from, to - from, &bytes) == 0 ? bytes : 0; /* given back meanwhile: nothing */
}

/* What of the committed memory, and of the tables, is in RAM: asked stretch by stretch, without the lock. */
static void count_resident(struct uvas_arena *arena, struct uvas_arena_stats *stats) {
    uint32_t count = atomic_load_explicit(&arena->region_count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++) {
        const struct uvas_region *region = atomic_load_explicit(&arena->regions[i], memory_order_acquire);
        uintptr_t at = 0, until;
        while (uvas_spans_next(arena, region, &at, &until)) {
            stats->resident_bytes += resident(at, until);
            at = until;
        }
        uvas_region_tables(region, &at, &until);
        stats->metadata_bytes += resident(at, until);
    }
}

int uvas_arena_stats(uvas_id id, struct uvas_arena_stats *out) {
    struct uvas_arena *arena = shut(id);
    struct uvas_arena_stats stats = {0};
    if (!arena) {
        return -ESTALE;
    }
    struct walk walk = {.arena = arena};
    for (struct uvas_run *run = next_run(&walk); run; run = next_run(&walk)) {
        count_run(run, &stats);
    }
    count_heaps(arena, &stats);
    const struct uvas_run *largest = uvas_holes_largest(&arena->holes);
    stats.used_bytes = arena->used_bytes;
    stats.peak_bytes = arena->peak_bytes;
    stats.reserved_bytes = arena->reserved_bytes;
    stats.committed_bytes = arena->committed_bytes;
    stats.hole_bytes = arena->holes.bytes;
    stats.hole_count = arena->holes.count;
    stats.largest_hole = largest ? uvas_run_bytes(largest) : 0;
    stats.regions = atomic_load_explicit(&arena->region_count, memory_order_relaxed);
    stats.metadata_bytes += sizeof *arena;
    arena->giving++; /* or it might close, and its regions with it, while the kernel is asked */
    reopen(arena);
    count_resident(arena, &stats);
    (void)pthread_mutex_lock(&arena->lock);
    uvas_trim_end(arena);
    *out = stats;
    return 0;
}

/* ---- check ------------------------------------------------------------------------------------------------------------------------------------------------ */

#define BROKEN(...) return uvas_fail_invalid(__VA_ARGS__)

/* Whether the bin knows that a block is free. */
static bool known(const struct uvas_slab *slab, size_t index) {
    struct uvas_heap *owner = atomic_load_explicit(&slab->run.owner, memory_order_relaxed);
    const struct uvas_bin *bin = owner ? uvas_slab_bin(owner, slab) : NULL;
    size_t i = bin ? bin->knows : 0;
    while (i > 0 && bin->known[i - 1].state != &slab->blocks[index]) {
        i--;
    }
    return i > 0;
}

/* What a bin knows is so, and it knows it once: each block that it names is free, where it says, in a slab of the heap's own. */
static int check_bin(const struct uvas_arena *arena, const struct uvas_heap *heap, const struct uvas_bin *bin) {
    uint32_t class = (uint32_t)(bin - heap->bins);
    for (size_t i = 0; i < bin->knows; i++) {
        uintptr_t address = bin->known[i].address & ~UVAS_KNOWN_FRESH;
        const struct uvas_region *region = uvas_arena_region(arena, address);
        struct uvas_run *run = region ? uvas_region_find(region, address) : NULL;
        const struct uvas_slab *slab = run && uvas_run_state(run) == UVAS_RUN_SLAB ? (const struct uvas_slab *)run : NULL;
        size_t index = slab ? (address - uvas_run_base(run)) / uvas_class_bytes(class) : 0;
        bool twice = false;
        for (size_t j = 0; j < i; j++) {
            twice |= bin->known[j].state == bin->known[i].state;
        }
        if (twice || !slab || slab->class != class || atomic_load_explicit(&run->owner, memory_order_relaxed) != heap ||
            uvas_run_base(run) + index * uvas_class_bytes(class) != address || bin->known[i].state != &slab->blocks[index] ||
            atomic_load_explicit(bin->known[i].state, memory_order_relaxed) != UVAS_BLOCK_FREE) {
            BROKEN("arena %s: 0x%lx is kept as a free block of %zu bytes, and is none, or twice", arena->name, address, uvas_class_bytes(class));
        }
    }
    return 0;
}

static int check_slab(const struct uvas_arena *arena, struct uvas_slab *slab) {
    uint32_t count = atomic_load_explicit(&slab->run.count, memory_order_relaxed), free = 0;
    uintptr_t base = uvas_run_base(&slab->run);
    for (uint32_t i = 0; i < count; i++) {
        bool is_free = atomic_load_explicit(&slab->blocks[i], memory_order_relaxed) == UVAS_BLOCK_FREE;
        if (is_free && !(slab->summary >> i / UVAS_GROUP & 1) && !known(slab, i)) {
            BROKEN("arena %s: nobody knows that block %u of the slab at 0x%lx is free", arena->name, i, base);
        }
        free += is_free;
    }
    if (count - free + uvas_slab_known(slab) != (slab->used & ~UVAS_SLAB_UNLISTED) || count * uvas_class_bytes(slab->class) > uvas_run_bytes(&slab->run)) {
        BROKEN("arena %s: the slab at 0x%lx counts %u used of %u, and has %u free", arena->name, base,
               slab->used & ~UVAS_SLAB_UNLISTED, count, free);
    }
    const struct uvas_heap *owner = atomic_load_explicit(&slab->run.owner, memory_order_relaxed);
    const struct uvas_slab *listed = owner ? slab->used & UVAS_SLAB_UNLISTED ? owner->bins[slab->class].full : owner->bins[slab->class].free : NULL;
    while (listed && listed != slab) {
        listed = listed->next;
    }
    if (!listed || owner->arena != arena) {
        BROKEN("arena %s: the slab at 0x%lx is not in its owner's list", arena->name, base);
    }
    if (!slab->run.spare) {
        BROKEN("arena %s: the slab at 0x%lx has no spare", arena->name, base);
    }
    return 0;
}

static int check_run(const struct uvas_arena *arena, struct uvas_run *run, uintptr_t expected, bool after_hole) {
    uint32_t state = uvas_run_state(run);
    uintptr_t base = uvas_run_base(run);
    if (base != expected || (base | uvas_run_bytes(run)) & (uvas_page() - 1) || uvas_run_bytes(run) == 0) {
        BROKEN("arena %s: the run [0x%lx, +0x%zx) is not where the one before it ends, 0x%lx, or not of whole pages", arena->name, base,
               uvas_run_bytes(run), expected);
    }
    if (state == UVAS_RUN_HOLE && after_hole) {
        BROKEN("arena %s: two holes meet at 0x%lx", arena->name, base);
    }
    if (state == UVAS_RUN_NONE || uvas_region_find(run->region, base + uvas_run_bytes(run) - 1) != run) {
        BROKEN("arena %s: the run at 0x%lx is not found by its last page", arena->name, base);
    }
    if (!(arena->flags & UVAS_ARENA_BARE) && (state == UVAS_RUN_LARGE || state == UVAS_RUN_SLAB || state == UVAS_RUN_KEPT)) {
        for (uintptr_t at = base; at < base + uvas_run_bytes(run); at += UVAS_SPAN - at % UVAS_SPAN) {
            if (run->region->spans[uvas_span_index(run->region, at)] != UVAS_SPAN_COMMITTED) {
                BROKEN("arena %s: no memory is behind 0x%lx, which is in use", arena->name, at);
            }
        }
    }
    return state == UVAS_RUN_SLAB ? check_slab(arena, (struct uvas_slab *)run) : 0;
}

static int check_all(const struct uvas_arena *arena) {
    struct walk walk = {.arena = arena};
    size_t used = 0, holes = 0, hole_bytes = 0, covered = 0;
    uintptr_t expected = 0;
    const struct uvas_region *region = NULL;
    bool hole = false;
    for (struct uvas_run *run = next_run(&walk); run; run = next_run(&walk)) {
        if (run->region != region) {
            region = run->region;
            expected = atomic_load_explicit(&region->base, memory_order_relaxed);
            hole = false;
        }
        int rc = check_run(arena, run, expected, hole);
        if (rc < 0) {
            return rc;
        }
        hole = uvas_run_state(run) == UVAS_RUN_HOLE;
        expected += uvas_run_bytes(run);
        covered += uvas_run_bytes(run);
        holes += hole;
        hole_bytes += hole ? uvas_run_bytes(run) : 0;
        used += hole ? 0 : uvas_run_bytes(run);
    }
    if (covered != arena->reserved_bytes || holes != arena->holes.count || hole_bytes != arena->holes.bytes) {
        BROKEN("arena %s: runs cover 0x%zx of 0x%zx bytes, %zu holes of 0x%zx bytes where %zu of 0x%zx are listed", arena->name, covered,
               arena->reserved_bytes, holes, hole_bytes, arena->holes.count, arena->holes.bytes);
    }
    if (used < arena->used_bytes || (arena->limit && arena->used_bytes > arena->limit)) { /* a hole that is trimmed is counted in the first */
        BROKEN("arena %s: 0x%zx bytes are in use, 0x%zx are counted, of a limit of 0x%zx", arena->name, used, arena->used_bytes, arena->limit);
    }
    for (const struct uvas_heap *heap = arena->heaps; heap; heap = heap->next) {
        for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
            int rc = check_bin(arena, heap, &heap->bins[class]);
            if (rc < 0) {
                return rc;
            }
        }
    }
    return 0;
}

int uvas_arena_check(uvas_id id) {
    struct uvas_arena *arena = shut(id);
    if (!arena) {
        return -ESTALE;
    }
    int rc = check_all(arena);
    reopen(arena);
    return rc;
}
