/* arena.h: the parts of an arena, and the rules for touching them. Private to the arena's files:
 *
 *   metadata.c   memory for what is described below: never given back, and each piece stays what it is
 *   holes.c      the free runs of one arena: best fit
 *   region.c     one reservation of an arena: which run holds which page
 *   pages.c      runs of pages taken and given back
 *   spans.c      the memory behind them
 *   growth.c     the reservations
 *   trim.c       memory given back
 *   heap.c       what a thread keeps for itself, and the door through which it goes
 *   slab.c       small blocks
 *   find.c       the block that holds an address
 *   alloc.c      blocks allocated
 *   free.c       blocks freed
 *   large.c      blocks that are runs of their own
 *   resize.c     realloc
 *   arena.c      open, close, trim, fork
 *   census.c     statistics and check
 *
 * The theory. A *region* is one reservation. Its pages are divided into *runs*: a hole, a large block, or a *slab*, which holds blocks of one size.
 * Each thread has a *heap* in each arena that it uses: slabs that it owns, and a few runs that it freed lately. Only the owner takes blocks from a
 * slab and only the owner puts them back; whoever else frees a block marks it, and the owner collects.
 *
 * Nothing of this lies in the memory that it describes.
 *
 * Who may touch what:
 *   a heap and the slabs that it owns   its thread, *inside* (heap.c), or anybody who has shut the arena's doors
 *   holes, runs, regions, counters      under arena->lock, which is never held over a system call (but fork), a callback or a touch of a block
 *   the state of a slab's block         free to live and back: the owner; live to freed: anyone, by a compare-and-swap; freed to free: the owner
 *   a slab's pending, a heap's stack    anyone, atomically
 *   the map from pages to runs          written under arena->lock, read by anyone at any time
 * Order of locks: door, then lock, then metadata's. A thread that is inside may take the lock and never the door.
 */
#ifndef UVAS_ARENA_H
#define UVAS_ARENA_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "slots.h"
#include "space.h"
#include "uvas.h"

#pragma GCC visibility push(hidden) /* said of each variable, so that it is found without a table */

#define UVAS_SPAN ((size_t)2 << 20)           /* memory is committed and given back in such pieces, aligned */
#define UVAS_SMALL_MAX ((size_t)256 << 10)    /* larger blocks are runs of their own */
#define UVAS_CLASSES 96u                      /* 8 up to 128 bytes, then 8 for each doubling */
#define UVAS_GROUP ((size_t)64)               /* blocks of a slab; it has at most as many groups, so that one word tells which have free blocks */
#define UVAS_BINS 512u                        /* holes of so many pages and fewer have a list for each size */
#define UVAS_KNOWN 14u /* free blocks that a bin knows without looking at bytes; so that a bin has 256 bytes */
#define UVAS_KEPT_RUNS 16u                    /* by a heap */
#define UVAS_KEPT_RUN_MAX ((size_t)4 << 20)   /* bytes of the largest of them */
#define UVAS_KEPT_MAX ((size_t)16 << 20)      /* bytes of all of them */
#define UVAS_ALIGN_MAX ((size_t)1 << 30)
#define UVAS_REGIONS_MAX 256u

/* ---- metadata.c: pieces of a kind come back as the same kind, for any arena, and each has a `link` that only metadata.c touches. So a reader
 * without a lock may follow an old pointer: it finds a piece of the same kind, and asks it whether it is the one it looked for. ---- */

enum uvas_metadata_kind {
    UVAS_METADATA_RUN,
    UVAS_METADATA_HEAP,
    UVAS_METADATA_ARENA,
    UVAS_METADATA_SLAB, /* with one group of blocks; from here on each has twice as many as the one before */
    UVAS_METADATA_KINDS = UVAS_METADATA_SLAB + 7,
};

void *uvas_metadata_take(enum uvas_metadata_kind kind, bool may_wait); /* zeroed at its first use only; may_wait: may ask the kernel; or NULL */
void uvas_metadata_give(enum uvas_metadata_kind kind, void *piece);
size_t uvas_metadata_bytes(enum uvas_metadata_kind kind);
void uvas_metadata_forget_arenas(void); /* the child of a fork: some thread of the parent's may have held the locks of one that is not in use */
void uvas_metadata_lock(void); /* over fork */
void uvas_metadata_unlock(void);

/* ---- runs ---------------------------------------------------------------------------------------------------------------------------- */

enum uvas_run_state {
    UVAS_RUN_NONE = 0, /* not in use */
    UVAS_RUN_HOLE,
    UVAS_RUN_BUSY, /* being set up, or its memory is being given back: one thread's */
    UVAS_RUN_KEPT, /* in a heap */
    UVAS_RUN_LARGE, /* a live block */
    UVAS_RUN_SLAB,
};

struct uvas_run { /* the first cache line is what those read who allocate and free; it changes rarely */
    _Atomic uint32_t state;    /* enum uvas_run_state. Written under the lock, or by the one thread whose BUSY or KEPT run it is; LARGE to
                                  KEPT or BUSY by a compare-and-swap, as anybody may try to free a block */
    _Atomic uint32_t version;  /* counts changes of base and bytes; read before and after by those who look without a lock */
    _Atomic uintptr_t base;    /* base, bytes: written under the lock while state is BUSY or HOLE */
    _Atomic size_t bytes;
    _Atomic(struct uvas_heap *) owner; /* slabs; NULL in what never is one. Changed by the owner, or with the doors shut; read by anyone */
    union {
        struct { /* holes, under the lock */
            struct uvas_run *next, *previous;           /* in the list of their size, or */
            struct uvas_run *idle_next, *idle_previous; /* holes in the order in which they last grew */
        };
        struct { /* slabs */
            _Atomic uint64_t reciprocal;       /* 2^64 / block_bytes, rounded up; fixed while it is a slab, as are the next two; read by anyone */
            _Atomic uint32_t block_bytes;
            _Atomic uint32_t count;
            _Atomic uint32_t pending;  /* 1: it is in some heap's stack, or about to be. Never reset but by who takes it off */
            uint32_t bin_at; /* the bytes of a heap before its bin. The owner's */
            uint32_t groups; /* fixed for this piece of metadata */
        };
    };
    void *link; /* metadata.c's */
    struct uvas_region *region; /* as base */
    union {
        struct uvas_run *spare; /* slabs: what describes the hole when it is given back, so that giving back needs no memory */
        uint64_t idle_since;    /* holes: ns; 0: not in that list */
    };
    _Atomic size_t guard;   /* large blocks: bytes at the end that fault */
};
_Static_assert(offsetof(struct uvas_run, link) == 64, "what is read together lies together");
#define left next /* of a hole in the tree */
#define right previous

/* Relaxed: whoever needs an order has the lock, or reads `version` around it. */
static inline uintptr_t uvas_run_base(const struct uvas_run *run) {
    return atomic_load_explicit(&run->base, memory_order_relaxed);
}

static inline size_t uvas_run_bytes(const struct uvas_run *run) {
    return atomic_load_explicit(&run->bytes, memory_order_relaxed);
}

static inline void uvas_run_set_state(struct uvas_run *run, enum uvas_run_state state) {
    atomic_store_explicit(&run->state, state, memory_order_release);
}

static inline uint32_t uvas_run_state(const struct uvas_run *run) {
    return atomic_load_explicit(&run->state, memory_order_acquire);
}

enum uvas_block_state { UVAS_BLOCK_LIVE = 0, UVAS_BLOCK_FREE = 1, UVAS_BLOCK_FREED = 2 /* by another than the owner, and not yet collected */ };

struct uvas_slab { /* the second line is seldom used, the third is the owner's */
    struct uvas_run run; /* first: the map points to either */
    struct uvas_slab *pending_next; /* of who set pending */
    uint32_t class; /* from here on the owner's */
    bool clean;     /* its pages were zero when it was made */
    _Alignas(64) uint64_t summary; /* which groups have free blocks that the bin does not know, or had when somebody looked last */
    uint32_t used;  /* blocks that are live, freed by others and not yet collected, or known to the bin; and UNLISTED */
    struct uvas_slab *next, *previous;
    uint32_t high; /* no block from this index on was ever known to a bin */
    _Alignas(64) _Atomic unsigned char blocks[]; /* enum uvas_block_state of each */
};

typedef uint64_t __attribute__((may_alias)) uvas_eight; /* states of eight blocks */

/* Which blocks of a group are in `state`, FREE or FREED, a bit for each. Tells where to look; orders nothing. */
static inline uint64_t uvas_slab_group(const struct uvas_slab *slab, size_t group, enum uvas_block_state state) {
    const uvas_eight *eights = (const uvas_eight *)(const void *)&slab->blocks[group * UVAS_GROUP];
    uint64_t found = 0;
    for (size_t i = 0; i < UVAS_GROUP / 8; i++) {
        uint64_t states = __atomic_load_n(&eights[i], __ATOMIC_RELAXED);
        states = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? __builtin_bswap64(states) : states;
        uint64_t ones = states >> (state - UVAS_BLOCK_FREE) & UINT64_C(0x0101010101010101);
        found |= ones * UINT64_C(0x0102040810204080) >> 56 << 8 * i; /* the lowest bits of eight bytes, side by side */
    }
    return found;
}

#define UVAS_SLAB_UNLISTED UINT32_C(0x80000000) /* of used: it is not in its bin's list of those with free blocks, but in the other */

/* ---- holes.c: under the lock -------------------------------------------------------------------------------------------------------------- */

struct uvas_holes {
    struct uvas_run *bins[UVAS_BINS + 1]; /* by pages; [0] unused */
    uint64_t filled[UVAS_BINS / 64 + 1];  /* which of them are not empty */
    struct uvas_run *root;                /* larger ones: a treap by (bytes, base) */
    struct uvas_run *idle_first, *idle_last;
    size_t count;
    size_t bytes;
};

void uvas_holes_add(struct uvas_holes *holes, struct uvas_run *run);
void uvas_holes_remove(struct uvas_holes *holes, struct uvas_run *run);
/* The smallest hole that holds `bytes` at a multiple of `align`, the lowest of the large ones; NULL if none does. O(log n); with more than the page
 * as alignment O(n) in those that are large enough but lie badly. */
struct uvas_run *uvas_holes_best(const struct uvas_holes *holes, size_t bytes, size_t align);
struct uvas_run *uvas_holes_largest(const struct uvas_holes *holes);
void uvas_holes_note_idle(struct uvas_holes *holes, struct uvas_run *run, uint64_t now);
void uvas_holes_drop_idle(struct uvas_holes *holes, struct uvas_run *run);

/* ---- region.c -------------------------------------------------------------------------------------------------------------------------------- */

enum uvas_span_state { UVAS_SPAN_NONE = 0, UVAS_SPAN_COMMITTING, UVAS_SPAN_COMMITTED, UVAS_SPAN_DECOMMITTING };

struct uvas_region { /* never freed; its tables stay, and serve the next reservation that fits */
    struct uvas_region *link; /* of those not in use */
    struct uvas_arena *arena;
    _Atomic uvas_id arena_id; /* 0: not in use. Read by anyone */
    _Atomic uintptr_t base; /* base, bytes: fixed while it is in use */
    _Atomic size_t bytes;
    size_t capacity; /* pages that the tables are for */
    uvas_id reservation;
    uvas_id lease;
    uintptr_t reservation_base;
    int huge; /* the file of huge pages, or -1 */
    bool ours; /* the arena made the reservation */
    _Atomic(struct uvas_run *) *map;   /* for each page: see uvas_region_mark */
    _Atomic(struct uvas_run *) *whole; /* for each block of pages */
    uint64_t *touched;   /* for each page: handed out since it was committed, so not known to be zero. Under the lock */
    unsigned char *spans; /* for each span: enum uvas_span_state. Under the lock */
};

struct uvas_region *uvas_region_take(size_t pages); /* with tables for so many pages, all zero; may ask the kernel; or NULL */
void uvas_region_give(struct uvas_region *region);
void uvas_region_tables(const struct uvas_region *region, uintptr_t *from, uintptr_t *to); /* where they lie, in whole pages */
/* Sets where a run is. Under the lock. */
void uvas_run_place(struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes);
/* Makes the run findable as what `state` says. Nothing is ever taken out of the map: what is found is asked whether it is there. Under the lock. */
void uvas_region_mark(struct uvas_region *region, struct uvas_run *run, enum uvas_run_state state);
/* The run that holds an address of the region, by any thread at any time; NULL where none was ever. What it says is true if it was while the call ran. */
struct uvas_run *uvas_region_find(const struct uvas_region *region, uintptr_t address);
/* Marks pages as touched. */
void uvas_region_touch(struct uvas_region *region, uintptr_t base, size_t bytes);
/* Whether any page there has been; *until: the end of the pages that are like the first. */
bool uvas_region_touched(const struct uvas_region *region, uintptr_t base, uintptr_t end, uintptr_t *until);
void uvas_region_untouch(struct uvas_region *region, uintptr_t base, size_t bytes);

static inline size_t uvas_span_index(const struct uvas_region *region, uintptr_t address) {
    return address / UVAS_SPAN - atomic_load_explicit(&region->base, memory_order_relaxed) / UVAS_SPAN;
}

/* ---- arenas -------------------------------------------------------------------------------------------------------------------------------------- */

struct uvas_known { /* a free block of a slab */
    uintptr_t address; /* and FRESH: it was never handed out, and its pages were zero */
    _Atomic unsigned char *state; /* its byte of the slab's blocks */
};

#define UVAS_KNOWN_FRESH ((uintptr_t)1)

struct uvas_bin { /* slabs of one class that a heap owns */
    uint32_t knows, most;
    uint64_t allocated; /* blocks, ever */
    /* Free blocks, the last of which is the next to be handed out: those freed last, or the lowest of a slab. Free by their bytes, but counted as
     * used by their slabs, so that to hand out and to take back touches nothing else of a slab. At most `most`; whoever takes slabs away from the
     * heap makes it forget them. */
    struct uvas_known known[UVAS_KNOWN];
    struct uvas_slab *free; /* with free blocks, or some that are full by now */
    struct uvas_slab *full;
};
_Static_assert(sizeof(struct uvas_bin) == 256, "a bin is found by a shift");

#define UVAS_NO_ARENA UINT64_MAX /* no id, also not 0, which callers may have */

struct uvas_heap {
    /* The door. `inside`: written by the owner only, 1 while it works in here. `shut`, `open_to`: written under the arena's door by who shuts it.
     * Each side writes its word, then reads the other's; which needs a full barrier between, and that is the other side's (membarrier). */
    _Atomic uint32_t inside;
    atomic_bool shut;
    _Atomic uvas_id open_to; /* the arena's id while the door is open; UVAS_NO_ARENA: it is shut or ajar, or the heap is of no arena */
    _Atomic uvas_id arena_id; /* UVAS_NO_ARENA: of none now. Changed by the owner, or with the door shut */
    /* Where the last block that this thread freed lay: base, bytes and map of that region. The owner's */
    uintptr_t near_base;
    size_t near_bytes;
    _Atomic(struct uvas_run *) *near_map;
    uint32_t near_shift; /* uvas_page_shift */
    uint32_t bare;     /* 1 or 0 */
    uint32_t hardened; /* GUARD and POISON of the arena's flags: then its door is never open, only ajar, and every way is a slower one */
    struct uvas_arena *arena;
    void *link; /* metadata.c's */
    _Atomic(struct uvas_slab *) pending; /* slabs in which others freed blocks: pushed by anyone, taken whole by the owner */
    struct uvas_heap *next, *previous;   /* in the arena's list; under its door, as is the next */
    bool idle; /* its thread has ended */
    uint64_t large_blocks, large_bytes;  /* allocated, ever */
    size_t kept_bytes;
    uint32_t visits; /* of slower ways */
    bool asking; /* its thread is in the arena's callback, which is not called for what it allocates itself; that thread's alone */
    bool due; /* some memory has been idle for long, and who noticed might not wait */
    uint32_t kept_next; /* where the next kept run goes */
    size_t kept_sizes[UVAS_KEPT_RUNS]; /* 0: none is kept there */
    struct uvas_run *kept[UVAS_KEPT_RUNS];
    struct uvas_bin bins[UVAS_CLASSES];
};

struct uvas_arena {
    void *link; /* metadata.c's */
    uvas_id id;
    char name[64];
    uvas_id space; /* 0: it does not grow */
    struct uvas_tenant tenant; /* in that space's list */
    uint32_t flags, pages, node;
    size_t growth, limit;
    uint64_t idle_ns;
    int (*exhausted)(void *context, size_t size);
    void *context;
    bool ready; /* its locks are made */
    pthread_mutex_t door; /* held by who shuts the heaps' doors, as long as they are shut */
    pthread_mutex_t lock;
    pthread_cond_t moved; /* with lock: a span is no longer on its way, the arena has grown, nobody gives memory back any more */
    struct uvas_heap *heaps; /* of threads; under door */
    struct uvas_heap resting; /* slabs whose free pages are being emptied: nobody takes blocks from them meanwhile. As orphans */
    struct uvas_heap orphans; /* nobody's slabs: of threads that have ended. Under lock, but for pending */
    struct uvas_holes holes;
    struct uvas_run *stuck; /* freed, KEPT, linked by `next`: the kernel would not take their guards away. Under lock */
    _Atomic(struct uvas_region *) regions[UVAS_REGIONS_MAX]; /* appended under lock, read by anyone */
    _Atomic uint32_t region_count;
    bool growing; /* one thread takes a reservation; under lock */
    bool emptying; /* one thread has slabs rest; under lock */
    uint32_t giving; /* threads that give memory back, which need no block to be here; under lock. close waits for them */
    size_t used_bytes, peak_bytes, committed_bytes, reserved_bytes;
    uint64_t ended_blocks, ended_bytes; /* what heaps that are gone had counted */
    struct uvas_arena *next, *previous; /* in the list of all, or, in a forked child, of the parent's */
};

/* -- pages.c -- */

enum uvas_effort {
    UVAS_EFFORT_NO_WAIT, /* no system call, no wait: -EAGAIN instead, and nothing is said */
    UVAS_EFFORT_MODEST,  /* the arena may grow and commit; nobody is disturbed */
    UVAS_EFFORT_FULL,    /* everything that threads keep is called in, idle memory is given back */
};

struct uvas_request { /* of whole pages */
    struct uvas_arena *arena;
    uvas_id id; /* the arena's, for which it was looked up */
    size_t asked; /* what the caller of the caller wanted, for messages */
    size_t bytes, align;
    enum uvas_effort effort;
    bool zero; /* its bytes are to be zero */
    bool slab; /* the run is a slab's, with a spare */
};

/* A run of whole pages, described by *run (state BUSY; an empty piece of metadata before), with memory behind it unless the arena is bare. *touched:
 * it held (without `zero`: holds) other bytes than zeros, perhaps. Outside. 0; -ENOSPC, -ENOMEM, -EDQUOT or another, said; -EAGAIN. Where it fails,
 * *run may be another one, or NULL (a slab's spare likewise). */
int uvas_pages_take(const struct uvas_request *request, struct uvas_run **run, bool *touched);
/* Gives it back: from here on it is a hole, described by `hole`, or by `run` itself where that is no slab (hole NULL). Cannot fail. Under the lock.
 * true: some hole has been idle for so long that uvas_trim_holes should be called. */
bool uvas_pages_give(struct uvas_arena *arena, struct uvas_run *run, struct uvas_run *hole);
/* Grows a large block in place by the hole behind it, or shrinks it. Outside; may wait. 0, or -EAGAIN: cannot be. */
int uvas_pages_resize(struct uvas_arena *arena, struct uvas_run *run, size_t bytes);
void uvas_pages_collect(struct uvas_arena *arena); /* all that threads keep is the arena's again. Outside; shuts the doors */
bool uvas_pages_idle(const struct uvas_arena *arena); /* some hole has been idle for long. Under lock */
uint64_t uvas_pages_now(void); /* ns, of a coarse clock */
/* A run that is nobody's joins the holes beside it. `run` describes the result, which has been idle as long as its largest part. Under lock. */
void uvas_pages_join(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes);
void uvas_pages_make_hole(struct uvas_arena *arena, struct uvas_run *run, struct uvas_region *region, uintptr_t base, size_t bytes); /* under lock */

/* -- growth.c -- */

int uvas_arena_grow(const struct uvas_request *request); /* another reservation of its space. Outside. 0, -ENOSPC: it may not; or what is said */
int uvas_arena_add_region(struct uvas_arena *arena, uvas_id reservation, uintptr_t base, size_t size, bool ours);
/* Undoes it; nothing of it is in use any more. Outside, the arena closing. 0 or what is said. */
int uvas_arena_drop_region(struct uvas_arena *arena, struct uvas_region *region);

/* -- spans.c: under lock, which those that say so drop -- */

int uvas_spans_back(struct uvas_arena *arena, const struct uvas_run *run, enum uvas_effort effort); /* memory behind a BUSY run; drops it */
uint64_t uvas_spans_unback(struct uvas_arena *arena, const struct uvas_run *run); /* gives back that of whole spans in a BUSY run; drops it */
bool uvas_spans_backed(const struct uvas_run *run); /* whether a whole span in it has memory */
void uvas_spans_zero(struct uvas_arena *arena, struct uvas_region *region, uintptr_t base, uintptr_t end); /* what was touched; drops it */
/* The next committed stretch of a region from *at on (0: from its start): [*at, *until). Takes the lock. */
bool uvas_spans_next(struct uvas_arena *arena, const struct uvas_region *region, uintptr_t *at, uintptr_t *until);

/* -- trim.c: outside; they wait, and return bytes -- */

/* Whoever looks at memory that no block keeps: the arena stays until the end of it. Takes the lock; false: it is closed. */
bool uvas_trim_begin(struct uvas_arena *arena);
void uvas_trim_end(struct uvas_arena *arena); /* drops it */
uint64_t uvas_trim_holes(struct uvas_arena *arena, uint64_t until, size_t most); /* spans in at most so many holes that have been idle since then */
uint64_t uvas_trim_pages(struct uvas_arena *arena); /* pages of all holes, whose spans stay committed. O(runs) */
uint64_t uvas_trim_slabs(struct uvas_arena *arena); /* pages of slabs that nobody owns, in which no block lives. O(blocks) */
void uvas_trim_guards(struct uvas_arena *arena);    /* tries again to take guards away that stuck */

extern uint32_t uvas_page_shift; /* log2 of the page; written once, with the platform */
static inline size_t uvas_page(void) {
    return (size_t)1 << uvas_page_shift;
}

/* -- heap.c -- */

/* The calling thread's heap in an arena, made at its first use; NULL with *rc: the arena is dead, which is said; there is no memory, which is said if
 * it may wait; -EAGAIN. */
struct uvas_heap *uvas_heap_of(uvas_id arena, bool may_wait, int *rc);
int uvas_heap_go_in(struct uvas_heap *heap, uvas_id id, bool wait); /* 0; -EAGAIN: who may not wait would have to; -ESTALE: the arena is dead, which is said */
void uvas_heap_wait_at_door(struct uvas_heap *heap);
void uvas_doors_shut(struct uvas_arena *arena); /* every thread is outside, and stays there */
void uvas_doors_open(struct uvas_arena *arena);
void uvas_door_unshut(struct uvas_heap *heap); /* open, or where it never is, ajar. Under door */
#define UVAS_ARENA_INDEX 0xffffffu /* of an id: slots.h */
void uvas_heap_empty(struct uvas_heap *heap); /* all that it keeps goes to the arena. The door is shut, or it is the caller's own; under lock */
void uvas_heap_count(struct uvas_heap *heap);  /* its counters go to the arena. Likewise */
void uvas_heaps_forget(void); /* the child of a fork: the calling thread has no heaps */
int uvas_heaps_ready(void);

/* The calling thread's heaps, by the index in their arena's id (NULL: none has been made; a heap of an earlier arena tells by its arena_id), and the one
 * used last. In the TLS block that is there from the start (a few bytes), as it is on the way of every call. */
extern _Thread_local struct uvas_thread {
    struct uvas_heap *last;
    struct uvas_heap **list;
    uint32_t count;
} uvas_thread __attribute__((tls_model("initial-exec")));

/* Goes inside, if the heap is that arena's. false: it is not, or the door is shut (or this kernel has no membarrier: then it is ajar), and the caller
 * is outside. */
static inline bool uvas_heap_enter(struct uvas_heap *heap, uvas_id id) {
    atomic_store_explicit(&heap->inside, 1, memory_order_relaxed);
    atomic_signal_fence(memory_order_seq_cst); /* the compiler's order; the processor's is made by membarrier on the other side */
    if (__builtin_expect(atomic_load_explicit(&heap->open_to, memory_order_acquire) == id, 1)) {
        return true;
    }
    atomic_store_explicit(&heap->inside, 0, memory_order_release);
    return false;
}

/* The same with the barrier on this side, for slower ways: also through a door that is ajar, and whoever's the heap is. */
static inline bool uvas_heap_enter_fenced(struct uvas_heap *heap) {
    (void)atomic_exchange_explicit(&heap->inside, 1, memory_order_seq_cst);
    if (!atomic_load_explicit(&heap->shut, memory_order_seq_cst)) {
        return true;
    }
    atomic_store_explicit(&heap->inside, 0, memory_order_release);
    return false;
}

static inline void uvas_heap_leave(struct uvas_heap *heap) {
    atomic_store_explicit(&heap->inside, 0, memory_order_release);
}

/* -- slab.c: inside, or with the doors shut -- */

#define UVAS_CLASS_DOUBLING 7u /* log2 of 128: from there on, */
#define UVAS_CLASS_STEPS 8u    /* a doubling: at most 12.5 % of a block are wasted */
#define UVAS_CLASS_FINE 1024u  /* up to here the steps are multiples of 16, beyond of 128 */

size_t uvas_class_bytes(uint32_t class);
enum uvas_metadata_kind uvas_slab_kind(size_t count); /* of a slab of so many blocks */
void uvas_classes_learn(void); /* fills the tables below, once */

/* By size - 1 in units of the smallest step: counting leading zeros takes eight times as long on some processors. */
extern unsigned char uvas_class_fine[UVAS_CLASS_FINE / 16];
extern unsigned char uvas_class_coarse[UVAS_SMALL_MAX / 128];

static inline uint32_t uvas_class_of(size_t size) { /* 1 <= size <= UVAS_SMALL_MAX */
    return __builtin_expect(size <= UVAS_CLASS_FINE, 1) ? uvas_class_fine[(size - 1) / 16] : uvas_class_coarse[(size - 1) / 128];
}

/* A slab for a class, empty, nobody's yet (its run is BUSY); as uvas_pages_take. Outside. */
int uvas_slab_make(struct uvas_arena *arena, uvas_id id, uint32_t class, enum uvas_effort effort, struct uvas_slab **out);
void uvas_slab_adopt(struct uvas_heap *heap, struct uvas_slab *slab);
/* Blocks that others freed come back to their slabs. Slabs that are empty then may end, under the lock: which the second one's caller holds. */
void uvas_heap_collect(struct uvas_heap *heap);
void uvas_heap_gather(struct uvas_heap *heap);
/* The same without asking the stack: a slab that had another life in another arena may be in a stack there. O(slabs). Under the lock. */
void uvas_heap_sweep(struct uvas_heap *heap);
/* An orphan with a free block of the class, now the heap's; false: there is none. Under lock. */
bool uvas_slab_find_orphan(struct uvas_heap *heap, uint32_t class);
static inline bool uvas_slab_has_room(const struct uvas_slab *slab) {
    return (slab->used & ~UVAS_SLAB_UNLISTED) < atomic_load_explicit(&slab->run.count, memory_order_relaxed);
}

static inline struct uvas_bin *uvas_slab_bin(struct uvas_heap *heap, const struct uvas_slab *slab) {
    return (struct uvas_bin *)(void *)((char *)heap + slab->run.bin_at);
}

/* The first slab in a bin's list that has a free block, NULL if none does; those before it go to the other list. */
struct uvas_slab *uvas_bin_slab(struct uvas_bin *bin);
void uvas_bin_learn(struct uvas_bin *bin, struct uvas_slab *slab); /* the lowest free blocks of a slab with room, where it knows none */
void uvas_bin_forget(struct uvas_heap *heap, struct uvas_bin *bin); /* what it knows is its slabs' again, which may end. Under the lock */
uint32_t uvas_bin_most(uint32_t class); /* how many free blocks a bin may know */

/* After the last block in use of a slab was freed, or the first of a full one. */
__attribute__((noinline)) void uvas_slab_changed(struct uvas_heap *heap, struct uvas_slab *slab);
uint32_t uvas_slab_known(const struct uvas_slab *slab); /* blocks that its owner's bin knows. With the doors shut */
void uvas_slab_end(struct uvas_arena *arena, struct uvas_slab *slab); /* empty, in no list: its pages become a hole. Under lock */
void uvas_slab_list(struct uvas_slab **list, struct uvas_slab *slab);
void uvas_slab_unlist(struct uvas_slab **list, struct uvas_slab *slab);
void uvas_slab_notify(struct uvas_slab *slab); /* after a block was marked as freed */

/* -- find.c: by anyone; true if it was so while the call ran -- */

/* Which block of the slab an offset is in; *begins: it is where that begins. By one multiplication: with c = 2^64 / size, rounded up, the upper half of
 * offset * c is the quotient and the lower half is below c where there is no remainder, for offsets below 2^32 (Lemire, Kaser and Kurz, Faster
 * remainder by direct computation, 2019). Of an offset that is beyond the slab the index is, too. */
static inline size_t uvas_slab_index(const struct uvas_slab *slab, size_t offset, bool *begins) {
    uint64_t reciprocal = atomic_load_explicit(&slab->run.reciprocal, memory_order_relaxed);
    unsigned __int128 product = (unsigned __int128)offset * reciprocal;
    *begins = (uint64_t)product < reciprocal;
    return (size_t)(product >> 64);
}

bool uvas_block_locate(const struct uvas_region *region, uintptr_t address, struct uvas_run **run, uintptr_t *base, size_t *bytes); /* a live block */
int uvas_block_not_live(uintptr_t address); /* says so: -EINVAL */
struct uvas_region *uvas_arena_region(const struct uvas_arena *arena, uintptr_t address); /* or NULL */

/* -- large.c -- */

static inline size_t uvas_block_pages(size_t size) { /* bytes of whole pages */
    return (size + uvas_page() - 1) & ~(uvas_page() - 1);
}

/* What a large block takes if there is room: sizes that threads may keep have 8 steps a doubling, as small ones have, so that what is freed serves
 * again. */
static inline size_t uvas_block_steps(size_t size) {
    if (size <= UVAS_SMALL_MAX || size > UVAS_KEPT_RUN_MAX) { /* the first: where there was no room for a slab */
        return uvas_block_pages(size);
    }
    size_t step = (size_t)1 << (63 - (uint32_t)__builtin_clzll(size - 1)) >> 3;
    return uvas_block_pages((size + step - 1) & ~(step - 1));
}

/* -- census.c -- */

uint64_t uvas_arena_in_use(const struct uvas_arena *arena); /* blocks that live, and runs at work. Doors shut, under lock */

/* -- arena.c -- */

/* By id; NULL and it is said: dead. Whoever uses it afterwards must know that it is not closed meanwhile: by a heap that is inside, or as the caller. */
struct uvas_arena *uvas_arena_get(uvas_id id);
/* In a forked child: the parent's arena with that id; NULL: there is none. */
struct uvas_arena *uvas_arena_inherited(uvas_id id);
void uvas_arenas_before_fork(void);
void uvas_arenas_after_fork_in_parent(void);
void uvas_arenas_after_fork_in_child(void);

#pragma GCC visibility pop

#endif
