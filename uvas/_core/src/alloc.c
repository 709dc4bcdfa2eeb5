/* alloc.c: blocks allocated. The short way first: a small block that the thread's heap knows to be free touches nothing that another thread writes.
 * Everything else is a slower way that ends in that one, or in a run of pages (large.c). */
#include <errno.h>
#include <string.h>

#include "block.h"
#include "failure.h"

/* ---- small blocks: inside ------------------------------------------------------------------------------------------------------------------------- */

/* The block that the bin knows best; *fresh: it is zero. */
QUICK uintptr_t take(struct uvas_bin *bin, bool *fresh) {
    const struct uvas_known *known = &bin->known[--bin->knows];
    atomic_store_explicit(known->state, UVAS_BLOCK_LIVE, memory_order_relaxed);
    bin->allocated++;
    *fresh = known->address & UVAS_KNOWN_FRESH;
    return known->address & ~UVAS_KNOWN_FRESH;
}

/* Sees to it that a bin knows a free block. What others freed is collected when there is nothing else: the later, the more comes at once. false: the heap
 * has none. */
static bool refill(struct uvas_heap *heap, uint32_t class) {
    struct uvas_bin *bin = &heap->bins[class];
    if (bin->knows) {
        return true;
    }
    if (!uvas_bin_slab(bin) && atomic_load_explicit(&heap->pending, memory_order_relaxed)) {
        uvas_heap_collect(heap);
    }
    if (!uvas_bin_slab(bin)) {
        (void)pthread_mutex_lock(&heap->arena->lock);
        (void)uvas_slab_find_orphan(heap, class);
        (void)pthread_mutex_unlock(&heap->arena->lock);
    }
    if (bin->free) {
        uvas_bin_learn(bin, bin->free);
    }
    return bin->knows > 0;
}

/* ---- alloc ----------------------------------------------------------------------------------------------------------------------------------------- */

/* A slab for one more block. 0, or what is said or -EAGAIN. Outside. */
static int add_slab(struct uvas_heap *heap, const struct uvas_ask *ask, uint32_t class) {
    struct uvas_slab *slab;
    int rc = uvas_slab_make(heap->arena, ask->id, class, ask->wait ? UVAS_EFFORT_MODEST : UVAS_EFFORT_NO_WAIT, &slab);
    if (rc == 0) {
        while (!uvas_heap_enter(heap, ask->id) && !uvas_heap_enter_fenced(heap)) { /* the arena cannot close: it has a busy run */
            uvas_heap_wait_at_door(heap);
        }
        uvas_slab_adopt(heap, slab);
        uvas_heap_leave(heap);
    }
    return rc;
}

/* Where there is no room for a slab: what threads keep is called in, which may bring a slab with a free block; then the block is a run of its own. */
static int alloc_small(struct uvas_heap *heap, const struct uvas_ask *ask, uint32_t class, uintptr_t *out) {
    for (bool collected = false;;) {
        int rc = uvas_heap_go_in(heap, ask->id, ask->wait);
        if (rc < 0) {
            return rc;
        }
        if (refill(heap, class)) {
            bool fresh;
            *out = take(&heap->bins[class], &fresh);
            bool idle = uvas_idle_come_by(heap);
            uvas_heap_leave(heap);
            if (idle) {
                uvas_idle_see_to(heap, ask->wait);
            }
            if (ask->zero && !fresh) {
                memset((void *)*out, 0, uvas_class_bytes(class));
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
            return uvas_large_alloc(heap, ask, out);
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

static int try_alloc(struct uvas_heap *heap, const struct uvas_ask *ask, uintptr_t *out) {
    bool guarded = (heap->hardened & UVAS_ARENA_GUARD) && ask->size > UVAS_GUARDED_LEAST;
    uint32_t class = guarded ? UVAS_CLASSES : class_for(ask->size, ask->align);
    return class < UVAS_CLASSES ? alloc_small(heap, ask, class, out) : uvas_large_alloc(heap, ask, out);
}

/* How uvas_alloc and its kin differ. */
enum { ZERO = 1, NO_WAIT = 2 };

SLOW static int alloc_any(uvas_id id, size_t size, size_t align, unsigned how, uintptr_t *out) {
    struct uvas_ask ask = {.id = id, .size = size, .align = align > UVAS_ALIGN_LEAST ? align : UVAS_ALIGN_LEAST, .zero = how & ZERO, .wait = !(how & NO_WAIT)};
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
        uvas_idle_see_to(heap, true);
    }
    rc = try_alloc(heap, &ask, out);
    if ((rc == -ENOMEM || rc == -ENOSPC || rc == -EDQUOT) && heap->arena->exhausted && !heap->asking) {
        struct uvas_failure said = *uvas_last_failure();
        heap->asking = true;
        int answer = heap->arena->exhausted(heap->arena->context, size);
        heap->asking = false;
        if (answer == 1) {
            return try_alloc(heap, &ask, out);
        }
        *uvas_fail(said.kind, said.code) = said;
    }
    return rc;
}

/* The next block that a bin knows. Inside; goes outside. */
QUICK int hand_out(struct uvas_heap *heap, struct uvas_bin *bin, unsigned how, uintptr_t *out) {
    bool fresh;
    uintptr_t base = take(bin, &fresh);
    uvas_heap_leave(heap);
    if ((how & ZERO) && !fresh) {
        memset((void *)base, 0, uvas_class_bytes((uint32_t)(bin - heap->bins)));
    }
    *out = base;
    return 0;
}

/* As below, where the bin has to look. Inside. */
SLOW static int alloc_after_look(struct uvas_heap *heap, uvas_id id, size_t size, unsigned how, uintptr_t *out) {
    struct uvas_bin *bin = &heap->bins[uvas_class_of(size)];
    if (uvas_bin_slab(bin)) {
        uvas_bin_learn(bin, bin->free);
        return hand_out(heap, bin, how, out);
    }
    uvas_heap_leave(heap);
    return alloc_any(id, size, 0, how, out);
}

QUICK int alloc(uvas_id id, size_t size, size_t align, unsigned how, uintptr_t *out) {
    struct uvas_heap *heap = uvas_thread.last;
    if (LIKELY(heap && size - 1 < UVAS_SMALL_MAX && (align == 0 || align == UVAS_ALIGN_LEAST) && uvas_heap_enter(heap, id))) {
        if (LIKELY(!(how & ZERO & heap->bare))) {
            struct uvas_bin *bin = &heap->bins[uvas_class_of(size)];
            return LIKELY(bin->knows) ? hand_out(heap, bin, how, out) : alloc_after_look(heap, id, size, how, out);
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

int uvas_alloc_zeroed_try(uvas_id arena, size_t size, size_t align, uintptr_t *out) {
    return alloc(arena, size, align, ZERO | NO_WAIT, out);
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

