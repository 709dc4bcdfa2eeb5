/* slab.c: small blocks. A slab is a run of pages cut into blocks of one size, with a byte for each, apart from them, that says whether it is live, free,
 * or freed by another thread than the owner; and a word that says which groups of them have free ones. The owner takes the lowest free blocks.
 *
 * Whoever else frees a block marks it, by a compare-and-swap, so of two who do one is told; and if nobody has yet (`pending`), pushes the slab onto its
 * owner's stack. The owner takes the whole stack, resets `pending` of each slab first, and then collects: a block marked after that pushes the slab again,
 * so none is overlooked. From a block's being freed to its being handed out again its byte says so, which is how a second free of it is noticed. Only
 * the owner needs no atomic operation: if another frees a block at the very moment at which the owner does, both succeed, and it is free once.
 *
 * A slab may end, and its piece of metadata become another slab, while it is still in some stack: whoever takes it off finds that it
 * is not his, and passes it on; who shuts the doors does not rely on it, and looks at every slab.
 */
#include <assert.h>
#include <errno.h>

#include "arena.h"

size_t uvas_class_bytes(uint32_t class) {
    if (class < UVAS_CLASS_STEPS) {
        return 16 * ((size_t)class + 1);
    }
    return (size_t)(UVAS_CLASS_STEPS + class % UVAS_CLASS_STEPS + 1) << (class / UVAS_CLASS_STEPS + UVAS_CLASS_DOUBLING - 4);
}

unsigned char uvas_class_fine[UVAS_CLASS_FINE / 16], uvas_class_coarse[UVAS_SMALL_MAX / 128]; /* written once */

void uvas_classes_learn(void) {
    uint32_t class = 0;
    for (size_t size = 16; size <= UVAS_SMALL_MAX; size += size < UVAS_CLASS_FINE ? 16 : 128) {
        class += size > uvas_class_bytes(class);
        if (size <= UVAS_CLASS_FINE) {
            uvas_class_fine[(size - 1) / 16] = (unsigned char)class;
        }
        uvas_class_coarse[(size - 1) / 128] = (unsigned char)class;
    }
    assert(class == UVAS_CLASSES - 1);
}

/* Enough blocks that the arena is rarely asked, few enough that a class of which a thread needs one block costs little: 64 KiB, and at least 4. Up to
 * 4 KiB a block has 16 bytes of bookkeeping at most, 8 a page of which are the map's: that takes 56. */
static size_t slab_bytes(size_t block_bytes) {
    size_t least = block_bytes <= 4096 ? 56 : block_bytes <= 16384 ? 16 : block_bytes <= 65536 ? 8 : 4, bytes = least * block_bytes;
    bytes = bytes > (size_t)64 << 10 ? bytes : (size_t)64 << 10;
    return (bytes + uvas_page() - 1) & ~(uvas_page() - 1);
}

enum uvas_metadata_kind uvas_slab_kind(size_t count) {
    enum uvas_metadata_kind kind = UVAS_METADATA_SLAB;
    while ((UVAS_GROUP << (kind - UVAS_METADATA_SLAB)) < count) {
        kind++;
    }
    assert(kind < UVAS_METADATA_KINDS);
    return kind;
}

/* ---- lists -------------------------------------------------------------------------------------------------------------------------------- */

void uvas_slab_list(struct uvas_slab **list, struct uvas_slab *slab) {
    slab->previous = NULL;
    slab->next = *list;
    if (slab->next) {
        slab->next->previous = slab;
    }
    *list = slab;
}

void uvas_slab_unlist(struct uvas_slab **list, struct uvas_slab *slab) {
    *(slab->previous ? &slab->previous->next : list) = slab->next;
    if (slab->next) {
        slab->next->previous = slab->previous;
    }
}

/* Behind the first, from which blocks are taken. */
static void list_second(struct uvas_slab **list, struct uvas_slab *slab) {
    if (!*list) {
        uvas_slab_list(list, slab);
        return;
    }
    slab->previous = *list;
    slab->next = (*list)->next;
    if (slab->next) {
        slab->next->previous = slab;
    }
    (*list)->next = slab;
}

/* ---- what a bin knows ----------------------------------------------------------------------------------------------------------------------- */

struct uvas_slab *uvas_bin_slab(struct uvas_bin *bin) {
    while (bin->free && !uvas_slab_has_room(bin->free)) {
        struct uvas_slab *slab = bin->free;
        uvas_slab_unlist(&bin->free, slab);
        uvas_slab_list(&bin->full, slab);
        slab->used |= UVAS_SLAB_UNLISTED;
    }
    return bin->free;
}

void uvas_bin_learn(struct uvas_bin *bin, struct uvas_slab *slab) {
    size_t count = atomic_load_explicit(&slab->run.count, memory_order_relaxed), left = count - slab->used;
    uintptr_t base = uvas_run_base(&slab->run), block = atomic_load_explicit(&slab->run.block_bytes, memory_order_relaxed);
    assert(bin->knows == 0 && left > 0 && slab->summary);
    bin->knows = (uint32_t)(left = left < bin->most ? left : bin->most);
    slab->used += bin->knows;
    while (left > 0) {
        size_t group = (size_t)__builtin_ctzll(slab->summary), index = 0;
        uint64_t free = uvas_slab_group(slab, group, UVAS_BLOCK_FREE);
        for (; free && left > 0; free &= free - 1) {
            index = group * UVAS_GROUP + (size_t)__builtin_ctzll(free);
            bin->known[--left] = (struct uvas_known){base + index * block + (slab->clean && index >= slab->high), &slab->blocks[index]};
        }
        slab->summary &= free ? ~UINT64_C(0) : slab->summary - 1;
        slab->high = index < slab->high ? slab->high : (uint32_t)index + 1;
    }
}

uint32_t uvas_bin_most(uint32_t class) {
    size_t bytes = uvas_class_bytes(class);
    return bytes <= 4096 ? UVAS_KNOWN : bytes <= 16384 ? 8 : bytes <= 65536 ? 4 : 2; /* as slabs of large blocks have few */
}

uint32_t uvas_slab_known(const struct uvas_slab *slab) {
    struct uvas_heap *owner = atomic_load_explicit(&slab->run.owner, memory_order_relaxed);
    const struct uvas_bin *bin = owner ? uvas_slab_bin(owner, slab) : NULL;
    uint32_t known = 0;
    for (uint32_t i = 0; bin && i < bin->knows; i++) {
        known += (size_t)(bin->known[i].state - slab->blocks) < UVAS_GROUP * slab->run.groups;
    }
    return known;
}

/* ---- beginning and end ----------------------------------------------------------------------------------------------------------------------- */

static void lay_out(struct uvas_slab *slab, uint32_t class, size_t bytes, size_t count, bool touched) {
    size_t block_bytes = uvas_class_bytes(class);
    slab->class = class;
    slab->run.bin_at = (uint32_t)(offsetof(struct uvas_heap, bins) + class * sizeof(struct uvas_bin));
    slab->used = slab->high = 0;
    slab->clean = !touched;
    atomic_store_explicit(&slab->run.block_bytes, (uint32_t)block_bytes, memory_order_relaxed);
    atomic_store_explicit(&slab->run.count, (uint32_t)count, memory_order_relaxed);
    atomic_store_explicit(&slab->run.reciprocal, UINT64_MAX / block_bytes + 1, memory_order_relaxed);
    assert(bytes / block_bytes >= count && count <= UVAS_GROUP * slab->run.groups);
    size_t groups = (count + UVAS_GROUP - 1) / UVAS_GROUP;
    slab->summary = ~UINT64_C(0) >> (64 - groups);
    for (size_t i = 0; i < groups * UVAS_GROUP; i++) {
        atomic_store_explicit(&slab->blocks[i], i < count ? UVAS_BLOCK_FREE : UVAS_BLOCK_LIVE, memory_order_relaxed);
    }
    for (size_t i = groups * UVAS_GROUP; i < slab->run.groups * UVAS_GROUP; i++) {
        atomic_store_explicit(&slab->blocks[i], UVAS_BLOCK_LIVE, memory_order_relaxed);
    }
}

int uvas_slab_make(struct uvas_arena *arena, uvas_id id, uint32_t class, enum uvas_effort effort, struct uvas_slab **out) {
    size_t bytes = slab_bytes(uvas_class_bytes(class)), count = bytes / uvas_class_bytes(class);
    bool wait = effort != UVAS_EFFORT_NO_WAIT, touched = false;
    enum uvas_metadata_kind kind = uvas_slab_kind(count);
    struct uvas_slab *slab = uvas_metadata_take(kind, wait);
    if (!slab) {
        return -EAGAIN;
    }
    if (slab->run.groups == 0) { /* its first use: others may know it from the later ones */
        slab->run.groups = 1u << (kind - UVAS_METADATA_SLAB);
    }
    slab->run.spare = uvas_metadata_take(UVAS_METADATA_RUN, wait);
    struct uvas_request request = {.arena = arena, .id = id, .asked = bytes, .bytes = bytes, .align = uvas_page(), .effort = effort, .slab = true};
    struct uvas_run *run = &slab->run;
    int rc = slab->run.spare ? uvas_pages_take(&request, &run, &touched) : -EAGAIN;
    if (rc < 0) {
        if (slab->run.spare) {
            uvas_metadata_give(UVAS_METADATA_RUN, slab->run.spare);
        }
        uvas_metadata_give(kind, slab);
        return rc;
    }
    lay_out(slab, class, bytes, count, touched);
    (void)pthread_mutex_lock(&arena->lock);
    uvas_region_mark(run->region, run, UVAS_RUN_SLAB);
    (void)pthread_mutex_unlock(&arena->lock);
    *out = slab;
    return 0;
}

void uvas_slab_adopt(struct uvas_heap *heap, struct uvas_slab *slab) {
    atomic_store_explicit(&slab->run.owner, heap, memory_order_release);
    slab->used &= ~UVAS_SLAB_UNLISTED;
    uvas_slab_list(&heap->bins[slab->class].free, slab);
    atomic_store_explicit(&slab->run.state, UVAS_RUN_SLAB, memory_order_release);
}

void uvas_slab_end(struct uvas_arena *arena, struct uvas_slab *slab) {
    assert((slab->used & ~UVAS_SLAB_UNLISTED) == 0);
    struct uvas_run *hole = slab->run.spare;
    atomic_store_explicit(&slab->run.owner, &arena->orphans, memory_order_release); /* no thread's: so a heap that is the owner knows that it is a slab */
    (void)uvas_pages_give(arena, &slab->run, hole);
    uvas_metadata_give(uvas_slab_kind(atomic_load_explicit(&slab->run.count, memory_order_relaxed)), slab);
}

/* A block of it has come back: it is where blocks are taken from. true: it is empty, and not needed; it is in no list any more. */
static bool relist(struct uvas_heap *heap, struct uvas_slab *slab) {
    struct uvas_bin *bin = &heap->bins[slab->class];
    if (slab->used & UVAS_SLAB_UNLISTED) {
        uvas_slab_unlist(&bin->full, slab);
        list_second(&bin->free, slab);
        slab->used &= ~UVAS_SLAB_UNLISTED;
    }
    if (!slab->used && (bin->free != slab || slab->next)) { /* an empty one is kept only where there is no other */
        uvas_slab_unlist(&bin->free, slab);
        return true;
    }
    return false;
}

void uvas_bin_forget(struct uvas_heap *heap, struct uvas_bin *bin) {
    while (bin->knows > 0) {
        const struct uvas_known *known = &bin->known[--bin->knows];
        const struct uvas_region *region = uvas_arena_region(heap->arena, known->address);
        struct uvas_slab *slab = (struct uvas_slab *)uvas_region_find(region, known->address);
        slab->summary |= UINT64_C(1) << (size_t)(known->state - slab->blocks) / UVAS_GROUP;
        slab->used--;
        if (relist(heap, slab)) {
            uvas_slab_end(heap->arena, slab);
        }
    }
}

void uvas_slab_changed(struct uvas_heap *heap, struct uvas_slab *slab) {
    if (relist(heap, slab)) {
        struct uvas_bin *bin = uvas_slab_bin(heap, slab);
        (void)pthread_mutex_lock(&heap->arena->lock);
        uvas_slab_end(heap->arena, slab);
        uvas_bin_forget(heap, bin); /* what it knows shall not keep other slabs, which are empty but for it */
        (void)pthread_mutex_unlock(&heap->arena->lock);
    }
}

/* ---- freed by others --------------------------------------------------------------------------------------------------------------------------- */

/* Onto a heap's stack; the slab is pending, and in no stack. */
static void push(struct uvas_heap *owner, struct uvas_slab *slab) {
    struct uvas_slab *top = atomic_load_explicit(&owner->pending, memory_order_relaxed);
    do {
        slab->pending_next = top;
    } while (!atomic_compare_exchange_weak_explicit(&owner->pending, &top, slab, memory_order_release, memory_order_relaxed));
}

void uvas_slab_notify(struct uvas_slab *slab) {
    /* Sequentially consistent, as is the reset in `collect`: the mark set before and this look are in one order with the reset and the look at marks. */
    if (atomic_load(&slab->run.pending) || atomic_exchange(&slab->run.pending, 1)) {
        return; /* whoever takes it off its stack will see the mark */
    }
    push(atomic_load_explicit(&slab->run.owner, memory_order_acquire), slab);
}

/* Takes in what others freed. true: as relist. */
static bool collect(struct uvas_heap *heap, struct uvas_slab *slab) {
    uint32_t collected = 0;
    for (size_t group = 0; group < slab->run.groups; group++) {
        uint64_t freed = uvas_slab_group(slab, group, UVAS_BLOCK_FREED);
        slab->summary |= (uint64_t)(freed != 0) << group;
        for (; freed; freed &= freed - 1) {
            _Atomic unsigned char *block = &slab->blocks[group * UVAS_GROUP + (size_t)__builtin_ctzll(freed)];
            collected++;
            (void)atomic_load_explicit(block, memory_order_acquire); /* all that was done with it comes before */
            atomic_store_explicit(block, UVAS_BLOCK_FREE, memory_order_relaxed);
        }
    }
    slab->used -= collected;
    return collected && relist(heap, slab);
}

static bool freed_by_others(const struct uvas_slab *slab) {
    size_t group = 0;
    while (group < slab->run.groups && !uvas_slab_group(slab, group, UVAS_BLOCK_FREED)) {
        group++;
    }
    return group < slab->run.groups;
}

static void collect_all(struct uvas_heap *heap, bool locked) {
    struct uvas_slab *slab = atomic_exchange_explicit(&heap->pending, NULL, memory_order_acquire), *next;
    for (; slab; slab = next) {
        next = slab->pending_next;
        struct uvas_heap *owner = atomic_load_explicit(&slab->run.owner, memory_order_acquire);
        if (uvas_run_state(&slab->run) == UVAS_RUN_SLAB && owner != heap) {
            push(owner, slab); /* still pending: who frees in it meanwhile relies on that */
            continue;
        }
        (void)atomic_exchange(&slab->run.pending, 0);
        if (uvas_run_state(&slab->run) == UVAS_RUN_SLAB && owner == heap) {
            if (collect(heap, slab)) {
                if (!locked) {
                    (void)pthread_mutex_lock(&heap->arena->lock);
                }
                uvas_slab_end(heap->arena, slab);
                if (!locked) {
                    (void)pthread_mutex_unlock(&heap->arena->lock);
                }
            }
        } else if (uvas_run_state(&slab->run) == UVAS_RUN_SLAB && freed_by_others(slab)) { /* it had ended, and is one again */
            uvas_slab_notify(slab);
        }
    }
}

void uvas_heap_collect(struct uvas_heap *heap) {
    collect_all(heap, false);
}

void uvas_heap_gather(struct uvas_heap *heap) {
    collect_all(heap, true);
}

void uvas_heap_sweep(struct uvas_heap *heap) {
    for (uint32_t class = 0; class < UVAS_CLASSES; class++) {
        struct uvas_slab *lists[] = {heap->bins[class].full, heap->bins[class].free}, *next;
        for (size_t i = 0; i < 2; i++) {
            for (struct uvas_slab *slab = lists[i]; slab; slab = next) {
                next = slab->next;
                if (freed_by_others(slab) && collect(heap, slab)) {
                    uvas_slab_end(heap->arena, slab);
                }
            }
        }
    }
}

bool uvas_slab_find_orphan(struct uvas_heap *heap, uint32_t class) {
    struct uvas_heap *orphans = &heap->arena->orphans;
    uvas_heap_gather(orphans);
    struct uvas_slab *slab = orphans->bins[class].free;
    if (!slab) {
        return false;
    }
    uvas_slab_unlist(&orphans->bins[class].free, slab);
    uvas_slab_adopt(heap, slab);
    return true;
}
