/* metadata.c: memory for the arenas' own bookkeeping. Pieces of one kind, cut from chunks that are never given back; a piece that comes back is used
 * again as the same kind. One lock, held for a few instructions; the kernel is asked outside it. */
#include <stddef.h>

#include "arena.h"
#include "vm.h"

#define CHUNK ((size_t)256 << 10)
#define LINE 64u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *unused[UVAS_METADATA_KINDS]; /* under lock, as are the next two */
static char *fresh;
static size_t fresh_bytes;

void uvas_metadata_lock(void) {
    (void)pthread_mutex_lock(&lock);
}

void uvas_metadata_unlock(void) {
    (void)pthread_mutex_unlock(&lock);
}

size_t uvas_metadata_bytes(enum uvas_metadata_kind kind) {
    static const size_t plain[] = {[UVAS_METADATA_RUN] = sizeof(struct uvas_run),
                                   [UVAS_METADATA_HEAP] = sizeof(struct uvas_heap),
                                   [UVAS_METADATA_ARENA] = sizeof(struct uvas_arena)};
    size_t bytes = kind < UVAS_METADATA_SLAB ? plain[kind] : offsetof(struct uvas_slab, blocks) + (UVAS_GROUP << (kind - UVAS_METADATA_SLAB));
    size_t unit = kind == UVAS_METADATA_RUN ? sizeof(void *) : LINE; /* slabs and heaps do not share cache lines with others' */
    return (bytes + unit - 1) / unit * unit;
}

/* Where a piece keeps the next of those not in use. */
static void **link_of(enum uvas_metadata_kind kind, void *piece) {
    return kind == UVAS_METADATA_HEAP    ? &((struct uvas_heap *)piece)->link
           : kind == UVAS_METADATA_ARENA ? &((struct uvas_arena *)piece)->link
                                         : &((struct uvas_run *)piece)->link;
}

_Static_assert(sizeof(struct uvas_heap) <= CHUNK && sizeof(struct uvas_arena) <= CHUNK, "a fresh chunk is enough for any piece");

static void *take(enum uvas_metadata_kind kind) { /* under lock */
    void *piece = unused[kind];
    if (piece) {
        unused[kind] = *link_of(kind, piece);
        return piece;
    }
    size_t bytes = uvas_metadata_bytes(kind), skip = kind == UVAS_METADATA_RUN ? 0 : (size_t)(-(uintptr_t)fresh % LINE);
    if (!fresh || fresh_bytes < skip + bytes) {
        return NULL;
    }
    char *at = fresh + skip;
    fresh = at + bytes;
    fresh_bytes -= skip + bytes;
    return at;
}

void uvas_metadata_forget_arenas(void) {
    unused[UVAS_METADATA_ARENA] = NULL;
}

void *uvas_metadata_take(enum uvas_metadata_kind kind, bool may_wait) {
    uvas_metadata_lock();
    void *piece = take(kind);
    uvas_metadata_unlock();
    while (!piece && may_wait) {
        char *chunk = uvas_vm_pages(CHUNK);
        if (!chunk) {
            return NULL;
        }
        uvas_metadata_lock();
        fresh = chunk; /* what was left of the one before is not worth a list */
        fresh_bytes = CHUNK;
        piece = take(kind);
        uvas_metadata_unlock();
    }
    return piece;
}

void uvas_metadata_give(enum uvas_metadata_kind kind, void *piece) {
    uvas_metadata_lock();
    *link_of(kind, piece) = unused[kind];
    unused[kind] = piece;
    uvas_metadata_unlock();
}
