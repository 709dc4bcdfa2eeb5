/* registry.c: see registry.h for what it promises.
 *
 * A B+tree keyed by end address. Inner node: child i holds the ranges whose ends lie in (key[i-1], key[i]]; the last key is the greatest number, and so
 * are unused keys, so that a search needs no count and always takes the same steps: a mispredicted branch would cost more than they do. Keys of a
 * published node never change. A change makes a new leaf and swings one pointer of its parent (or the root) to it; only a split or a merge makes a new
 * parent. So a reader, wherever it stands, sees each node as it was when it was published, or with newer children.
 *
 * Why a reader may trust what it read. Node N is unlinked, then stamped with ++clock (release), and rewritten only when clock >= stamp + WINDOW:
 * the writer has stored that clock, then a release fence, then N's words. A reader loads the clock s (acquire) and descends. If it got to N, N was
 * linked after that load, so stamp > s. If it read a rewritten word of N, its acquire fence at the end pairs with the writer's release fence, and
 * its second load of the clock gives at least stamp + WINDOW > s + WINDOW: it starts over. A doomed reader does no harm on the way: nodes are never
 * unmapped, a leaf never becomes an inner node, every pointer in a node is or was one to a node, and a descent has at most DEPTH_MAX steps.
 */
#include "registry.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nodes.h"
#include "vm.h"

#define LEAF_ENTRIES UVAS_LEAF_ENTRIES
#define LEAF_KEYS UVAS_LEAF_KEYS
#define INNER_CHILDREN UVAS_INNER_CHILDREN
#define BLOCK 8u /* keys that are compared side by side: a cache line */
#define DEPTH_MAX 12u /* 16 million ranges in leaves and inner nodes a quarter full need 6 */
#define LAST UVAS_NO_KEY
#define ANYWHERE ((uintptr_t)1 << 62) /* no address of ours is as high */
/* Put by before an insert: what it and a following remove can take, and a window's worth, so that nodes rest before they are reused. */
#define NODES_PUT_BY (UVAS_REGISTRY_WINDOW + 4 * DEPTH_MAX)
#define CHUNK_NODES 128u
#define CACHE_LINE ((size_t)UVAS_CACHE_LINE)
#define RESHAPED_PART 16u /* the guide is laid anew when that part of the leaves have been split or joined: for each, so many times its slots are written */
/* A lookup is short, and its callers pass constants: the compiler is to see through it. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

struct pool { /* under the lock, all of it */
    uint32_t kind;
    size_t node_bytes;
    char *fresh;              /* carved from here, `fresh_nodes` times */
    size_t fresh_nodes;
    struct chunk *chunks;     /* all, newest first */
    struct chunk *spare;      /* not carved yet */
    struct chunk *again;      /* in a forked child: this one and those behind it are carved again */
    struct uvas_node *first, *last; /* retired, oldest first */
    size_t retired, taken, bytes;
};

struct chunk {
    _Alignas(CACHE_LINE) struct chunk *next; /* nodes begin where cache lines do */
    struct chunk *next_spare;
    size_t nodes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
struct uvas_book uvas_book = {.root = UVAS_NO_LEAF};
uintptr_t uvas_guide_nothing = UVAS_NO_LEAF;
static size_t ranges;          /* under the lock */
static struct pool leaves = {.kind = UVAS_LEAF, .node_bytes = sizeof(struct uvas_leaf)};
static struct pool inners = {.kind = UVAS_INNER, .node_bytes = sizeof(struct uvas_inner)};
static struct uvas_guide *guide;       /* NULL: none yet; under the lock, as what follows */
static struct uvas_guide *guides_kept;
static size_t guide_bytes;             /* of all guides ever made */
static size_t reshaped, reshaped_enough; /* leaves split, joined and gone since the guide was laid, and how many call for another */
static uint64_t torn_first = UINT64_MAX, torn_last; /* slots to set anew at the end of this change; none: first > last */

void uvas_registry_lock(void) {
    (void)pthread_mutex_lock(&lock);
}

void uvas_registry_unlock(void) {
    (void)pthread_mutex_unlock(&lock);
}

void uvas_registry_wait(void) {
    (void)pthread_cond_wait(&condition, &lock);
}

void uvas_registry_wake(void) {
    (void)pthread_cond_broadcast(&condition);
}

/* ---- words ---------------------------------------------------------------------------------------------------------------------------------------- */

static inline uint64_t get(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void put(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline struct uvas_node *follow(const uvas_link *link) {
    return (struct uvas_node *)(__atomic_load_n(link, __ATOMIC_ACQUIRE) & ~UVAS_NO_LEAF);
}

static inline void publish(uvas_link *link, struct uvas_node *node) {
    uint64_t shift = node && node->kind == UVAS_LEAF ? ((const struct uvas_leaf *)node)->shift : UVAS_NO_LEAF;
    __atomic_store_n(link, (uintptr_t)node | shift, __ATOMIC_RELEASE);
}

static inline struct uvas_leaf *as_leaf(struct uvas_node *node) {
    return (struct uvas_leaf *)node;
}

static inline struct uvas_inner *as_inner(struct uvas_node *node) {
    return (struct uvas_inner *)node;
}

/* How many of the ascending keys are <= address: first which block of eight, then where in it. No branch depends on what is read, and the comparisons
 * of a block do not wait for each other. */
ALWAYS_INLINE size_t rank(const uint64_t *keys, size_t stride, size_t blocks, uintptr_t address) {
    size_t block = 0, within = 0;
    for (size_t i = 1; i < blocks; i++) {
        block += get(&keys[(i * BLOCK - 1) * stride]) <= address;
    }
    keys += block * BLOCK * stride;
#pragma GCC unroll 8
    for (size_t i = 0; i < BLOCK; i++) {
        within += get(&keys[i * stride]) <= address;
    }
    return block * BLOCK + within;
}

/* ---- nodes ---------------------------------------------------------------------------------------------------------------------------------------- */

/* Enough for NODES_PUT_BY is all that anybody asks. */
static bool has_put_by(const struct pool *pool) {
    return pool->spare || pool->again || pool->fresh_nodes + pool->retired >= NODES_PUT_BY;
}

static void carve_next_chunk(struct pool *pool) {
    struct chunk *chunk = pool->spare ? pool->spare : pool->again;
    if (chunk == pool->spare) {
        pool->spare = chunk->next_spare;
    } else {
        pool->again = chunk->next;
    }
    pool->fresh = (char *)(chunk + 1);
    pool->fresh_nodes = chunk->nodes;
}

static struct uvas_node *take(struct pool *pool) {
    bool rested = pool->first && uvas_book.publications - pool->first->stamp >= UVAS_REGISTRY_WINDOW;
    if (!rested && pool->fresh_nodes == 0 && (pool->spare || pool->again)) {
        carve_next_chunk(pool);
    }
    pool->taken++;
    if (!rested && pool->fresh_nodes > 0) {
        struct uvas_node *node = (struct uvas_node *)(void *)pool->fresh;
        pool->fresh += pool->node_bytes;
        pool->fresh_nodes--;
        if (node->kind == 0) { /* never written again, not even when a forked child carves the chunk anew */
            node->kind = pool->kind;
        }
        return node;
    }
    struct uvas_node *node = pool->first;
    assert(node && "uvas_registry_lock_for_insert puts nodes by");
    pool->first = node->next;
    pool->last = node->next ? pool->last : NULL;
    pool->retired--;
    if (uvas_book.publications - node->stamp < UVAS_REGISTRY_WINDOW) { /* in need: readers at work start over */
        __atomic_store_n(&uvas_book.publications, node->stamp + UVAS_REGISTRY_WINDOW, __ATOMIC_RELEASE);
    }
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return node;
}

/* The node has just been unlinked. */
static void retire(struct pool *pool, struct uvas_node *node) {
    node->stamp = uvas_book.publications + 1;
    node->next = NULL;
    __atomic_store_n(&uvas_book.publications, node->stamp, __ATOMIC_RELEASE);
    if (pool->last) {
        pool->last->next = node;
    } else {
        pool->first = node;
    }
    pool->last = node;
    pool->retired++;
    pool->taken--;
}

static struct pool *pool_of(const struct uvas_node *node) {
    return node->kind == UVAS_LEAF ? &leaves : &inners;
}

static void add_chunk(struct pool *pool, char *memory, size_t bytes) {
    struct chunk *chunk = (struct chunk *)(void *)memory;
    *chunk = (struct chunk){.next = pool->chunks, .next_spare = pool->spare, .nodes = (bytes - sizeof *chunk) / pool->node_bytes};
    pool->chunks = pool->spare = chunk;
    pool->bytes += bytes;
}

/* Drops the lock to allocate; true: with the lock. */
static bool put_by(struct pool *pool) {
    size_t bytes = sizeof(struct chunk) + CHUNK_NODES * pool->node_bytes;
    bool many = pool->bytes >= UVAS_VM_HUGE_PAGE; /* enough for the pages themselves to cost misses */
    bytes = many ? UVAS_VM_HUGE_PAGE : bytes;
    uvas_registry_unlock();
    char *memory = many ? uvas_vm_huge_pages(bytes) : uvas_vm_pages(bytes);
    if (!memory) { /* at max_map_count the heap may have what the kernel has not */
        bytes = (bytes + CACHE_LINE - 1) & ~(CACHE_LINE - 1);
        memory = aligned_alloc(CACHE_LINE, bytes);
        if (!memory) {
            return false;
        }
        memset(memory, 0, bytes);
    }
    uvas_registry_lock();
    add_chunk(pool, memory, bytes);
    return true;
}

ALWAYS_INLINE size_t inner_rank(const struct uvas_inner *inner, uintptr_t address) {
    return rank(inner->key, 1, INNER_CHILDREN / BLOCK, address);
}

ALWAYS_INLINE size_t leaf_rank(const struct uvas_leaf *leaf, uintptr_t address) {
    return rank((const uint64_t *)leaf->entry + offsetof(struct uvas_entry, end) / sizeof(uint64_t), sizeof(struct uvas_entry) / sizeof(uint64_t),
                LEAF_KEYS / BLOCK, address);
}

/* ---- lookups: no lock, no stores ------------------------------------------------------------------------------------------------------------------ */

/* The first node of the lowest level under `node`: its leftmost or rightmost leaf; NULL for a doomed reader. */
static struct uvas_leaf *edge_leaf(struct uvas_node *node, bool rightmost) {
    for (uint32_t depth = 0; node && depth < DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            return as_leaf(node);
        }
        size_t i = rightmost ? inner_rank(as_inner(node), LAST - 1) : 0;
        node = follow(&as_inner(node)->child[i % INNER_CHILDREN]);
    }
    return NULL;
}

struct path { /* where a descent went */
    struct uvas_leaf *leaf;
    struct uvas_node *left, *right; /* the subtrees next to it, or NULL */
};

ALWAYS_INLINE struct path descend(uintptr_t address) {
    struct path path = {NULL, NULL, NULL};
    struct uvas_node *node = follow(&uvas_book.root);
    for (uint32_t depth = 0; node && depth < DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            path.leaf = as_leaf(node);
            break;
        }
        struct uvas_inner *inner = as_inner(node);
        size_t i = inner_rank(inner, address);
        if (i >= INNER_CHILDREN) { /* a node that is being rewritten */
            break;
        }
        path.left = i > 0 ? follow(&inner->child[i - 1]) : path.left;
        struct uvas_node *right = i + 1 < INNER_CHILDREN ? follow(&inner->child[i + 1]) : NULL;
        path.right = right ? right : path.right;
        node = follow(&inner->child[i]);
    }
    return path;
}

static inline void copy_out(const struct uvas_leaf *leaf, size_t i, struct uvas_entry *out) {
    out->end = get(&leaf->entry[i].end);
    out->base = get(&leaf->entry[i].base);
    out->value = __atomic_load_n(&leaf->entry[i].value, __ATOMIC_ACQUIRE);
}

/* The lowest entry that ends above the address. */
ALWAYS_INLINE bool above(uintptr_t address, struct uvas_entry *out) {
    struct path path = descend(address);
    if (!path.leaf) {
        return false;
    }
    size_t i = leaf_rank(path.leaf, address);
    if (i < LEAF_ENTRIES && get(&path.leaf->entry[i].end) != LAST) {
        copy_out(path.leaf, i, out);
        return true;
    }
    struct uvas_leaf *next = path.right ? edge_leaf(path.right, false) : NULL; /* its fence lies above, its ranges do not */
    if (next) {
        copy_out(next, 0, out);
    }
    return next != NULL;
}

/* The highest entry that starts below the address. */
static bool before(uintptr_t address, struct uvas_entry *out) {
    struct path path = descend(address);
    if (!path.leaf) {
        return false;
    }
    size_t i = leaf_rank(path.leaf, address);
    if (i < LEAF_ENTRIES && get(&path.leaf->entry[i].end) != LAST && get(&path.leaf->entry[i].base) < address) {
        copy_out(path.leaf, i, out);
        return true;
    }
    if (i == LEAF_ENTRIES || get(&path.leaf->entry[i].end) == LAST) { /* the one that covers it may be the next leaf's first */
        struct uvas_leaf *next = path.right ? edge_leaf(path.right, false) : NULL;
        if (next && get(&next->entry[0].base) < address) {
            copy_out(next, 0, out);
            return true;
        }
    }
    struct uvas_leaf *leaf = i > 0 ? path.leaf : path.left ? edge_leaf(path.left, true) : NULL;
    if (leaf) {
        i = leaf == path.leaf ? i : leaf_rank(leaf, LAST - 1);
        copy_out(leaf, i > 0 ? i - 1 : 0, out);
    }
    return leaf != NULL;
}

/* Looks until nothing that was read can have been rewritten meanwhile. */
ALWAYS_INLINE int settled(bool (*look)(uintptr_t, struct uvas_entry *), uintptr_t address, struct uvas_entry *out) {
    for (;;) {
        uint64_t started = __atomic_load_n(&uvas_book.publications, __ATOMIC_ACQUIRE);
        struct uvas_entry seen;
        bool found = look(address, &seen);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__builtin_expect(get(&uvas_book.publications) - started < UVAS_REGISTRY_WINDOW, 1)) {
            if (found) {
                *out = seen;
            }
            return found;
        }
    }
}

int uvas_registry_next(uintptr_t address, struct uvas_entry *out) {
    return settled(above, address, out);
}

int uvas_registry_previous(uintptr_t address, struct uvas_entry *out) {
    return settled(before, address, out);
}

/* The leaf whose fences hold the address, and nothing else that `descend` learns. */
ALWAYS_INLINE struct uvas_leaf *leaf_of(uintptr_t address) {
    struct uvas_node *node = follow(&uvas_book.root);
    for (uint32_t depth = 0; node && depth < DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            return as_leaf(node);
        }
        size_t i = inner_rank(as_inner(node), address);
        node = i < INNER_CHILDREN ? follow(&as_inner(node)->child[i]) : NULL;
    }
    return NULL;
}

/* As `above`, but most addresses end in the first leaf, and then no neighbour has to be known. */
ALWAYS_INLINE bool holder(uintptr_t address, struct uvas_entry *out) {
    struct uvas_leaf *leaf = leaf_of(address);
    size_t i = leaf ? leaf_rank(leaf, address) : LEAF_ENTRIES;
    if (i < LEAF_ENTRIES && get(&leaf->entry[i].end) != LAST) {
        copy_out(leaf, i, out);
    } else if (!leaf || !above(address, out)) {
        return false;
    }
    return out->base <= address && !(out->value & UVAS_REGISTRY_HIDDEN);
}

static __attribute__((noinline)) int find_by_descent(uintptr_t address, struct uvas_entry *out) {
    return settled(holder, address, out);
}

/* Whether two neighbours in a leaf prove that nothing holds the address, or one that is hidden does. */
static bool proves_nobody(uintptr_t address) {
    const struct uvas_leaf *leaf;
    uint64_t started = uvas_book_clock();
    const struct uvas_entry *entry = uvas_book_guess(address, &leaf);
    if (!entry || get(&entry->end) == LAST) {
        return false;
    }
    uintptr_t base = get(&entry->base);
    bool between = address < base && entry > leaf->entry && get(&entry[-1].end) <= address;
    bool hidden = address - base < get(&entry->end) - base && __atomic_load_n(&entry->value, __ATOMIC_ACQUIRE) & UVAS_REGISTRY_HIDDEN;
    return (between || hidden) && uvas_book_stood(started);
}

int uvas_registry_find(uintptr_t address, struct uvas_entry *out) {
    struct uvas_entry seen;
    if (uvas_book_holds(address, &seen)) {
        *out = seen;
        return 1;
    }
    return !proves_nobody(address) && find_by_descent(address, out);
}

/* ---- the guide: under the lock -------------------------------------------------------------------------------------------------------------------- */

static size_t leaf_count(const struct uvas_leaf *leaf) {
    return leaf_rank(leaf, LAST - 1);
}

static size_t inner_count(const struct uvas_inner *inner) {
    return inner_rank(inner, LAST - 1) + 1; /* the last child's key is LAST too */
}

struct place { /* the inner node right above the leaves whose fences hold an address, or NULL: the root is a leaf or nothing */
    struct uvas_inner *inner;
    uintptr_t low, high; /* its fences */
};

static struct place place_of(uintptr_t address) {
    struct place place = {NULL, 0, LAST};
    for (struct uvas_node *node = follow(&uvas_book.root); node && node->kind == UVAS_INNER;) {
        place.inner = as_inner(node);
        size_t i = inner_rank(place.inner, address);
        node = follow(&place.inner->child[i]);
        if (node->kind == UVAS_INNER) {
            place.low = i > 0 ? place.inner->key[i - 1] : place.low;
            place.high = i + 1 < INNER_CHILDREN && place.inner->key[i] != LAST ? place.inner->key[i] : place.high;
        }
    }
    return place;
}

/* What belongs into a slot. */
static struct uvas_guide_slot slot_of(const struct uvas_guide *in, uint64_t slot, const struct place *place) {
    if (!place->inner) {
        return (struct uvas_guide_slot){0, &uvas_book.root};
    }
    size_t i = inner_rank(place->inner, uvas_guide_last_address(in, slot));
    return (struct uvas_guide_slot){i > 0 ? place->inner->key[i - 1] : place->low, &place->inner->child[i]};
}

static void fill_guide(struct uvas_guide *in, uint64_t first, uint64_t last) {
    struct place place = {NULL, 0, 0};
    for (uint64_t slot = first; slot <= last; slot++) {
        uintptr_t address = uvas_guide_last_address(in, slot);
        if (slot == first || address >= place.high) {
            place = place_of(address);
            if (place.inner) {
                place.inner->first_slot = (uint32_t)slot;
            }
        }
        struct uvas_guide_slot is = slot_of(in, slot, &place);
        uvas_guide_set(in, slot, is.fence, is.cell);
        if (place.inner) {
            place.inner->last_slot = (uint32_t)slot;
        }
    }
}

static bool names_cell_of(const struct uvas_guide_slot *slot, const struct uvas_inner *inner) {
    uvas_link *cell = slot->cell;
    return inner ? cell >= inner->child && cell < inner->child + INNER_CHILDREN : cell == &uvas_book.root;
}

/* Before an inner node above leaves is replaced; NULL: before the root stops to be a leaf. */
static void hide_cells(const struct uvas_inner *inner) {
    reshaped++;
    if (!guide) {
        return;
    }
    uint64_t first = inner ? inner->first_slot : 0, last = inner && inner->last_slot < guide->last ? inner->last_slot : guide->last;
    for (uint64_t slot = first; slot <= last; slot++) {
        if (names_cell_of(&guide->slot[slot], inner)) { /* the numbers may be from before the guide was laid anew */
            uvas_guide_set(guide, slot, 0, &uvas_guide_nothing);
            torn_first = slot < torn_first ? slot : torn_first;
            torn_last = slot > torn_last ? slot : torn_last;
        }
    }
}

/* At the end of a change. */
static void mend_guide(void) {
    if (torn_first <= torn_last) {
        fill_guide(guide, torn_first, torn_last);
    }
    torn_first = UINT64_MAX;
    torn_last = 0;
}

/* The end below which so many eighths of them are, if all nodes were equally full. */
static uintptr_t quantile(size_t eighths) {
    size_t of = 8;
    struct uvas_node *node = follow(&uvas_book.root);
    for (; node->kind == UVAS_INNER; of = 8) {
        size_t scaled = eighths * inner_count(as_inner(node));
        node = follow(&as_inner(node)->child[scaled / of]);
        eighths = scaled % of;
    }
    return as_leaf(node)->entry[eighths * leaf_count(as_leaf(node)) / of].end;
}

static void lay_guide(struct uvas_guide *in) {
    uintptr_t low = 0, high = ANYWHERE;
    struct uvas_node *root = follow(&uvas_book.root);
    if (root && root->kind == UVAS_INNER) {
        const struct uvas_leaf *last = edge_leaf(root, true);
        low = edge_leaf(root, false)->entry[0].base;
        high = last->entry[leaf_count(last) - 1].end;
        uvas_guide_window(&low, &high, quantile(1), quantile(7));
    }
    uvas_guide_lay(in, low, high);
    fill_guide(in, 0, in->last);
}

static struct uvas_guide *kept_guide(size_t bytes) {
    for (struct uvas_guide **at = &guides_kept; *at; at = &(*at)->kept) {
        if ((*at)->bytes == bytes) {
            struct uvas_guide *found = *at;
            *at = found->kept;
            return found;
        }
    }
    return NULL;
}

static void keep_guide(struct uvas_guide *old) {
    old->kept = guides_kept;
    guides_kept = old;
}

/* Drops the lock to allocate; without memory there is no new guide until as much has changed again. */
static bool make_guide(size_t bytes) {
    uvas_registry_unlock();
    struct uvas_guide *made = bytes >= UVAS_VM_HUGE_PAGE ? uvas_vm_huge_pages(bytes) : uvas_vm_pages(bytes);
    uvas_registry_lock();
    if (made) {
        made->bytes = bytes;
        guide_bytes += bytes;
        keep_guide(made);
    }
    return made != NULL;
}

/* Where the shape of the tree is no longer what the guide was laid for: lays it anew. True: the lock was dropped meanwhile. */
static bool renew_guide(void) {
    if (reshaped < reshaped_enough) {
        return false;
    }
    size_t bytes = uvas_guide_bytes(leaves.taken);
    struct uvas_guide *old = guide, *next = old && old->bytes >= bytes ? old : kept_guide(bytes);
    if (!next && make_guide(bytes)) {
        return true;
    }
    reshaped = 0;
    reshaped_enough = 1 + leaves.taken / RESHAPED_PART;
    if (!next) {
        return true;
    }
    lay_guide(next);
    uvas_guide_show(next, &uvas_book.guide);
    guide = next;
    if (old && old != next) {
        keep_guide(old);
    }
    return false;
}

int uvas_registry_lock_for_insert(void) {
    uvas_registry_lock();
    for (;;) {
        struct pool *lacking = !has_put_by(&leaves) ? &leaves : !has_put_by(&inners) ? &inners : NULL;
        if (lacking && !put_by(lacking)) {
            return -ENOMEM;
        }
        if (!lacking && !renew_guide()) {
            return 0;
        }
    }
}

/* ---- changes: under the lock ------------------------------------------------------------------------------------------------------------------------ */

struct step { /* one level of a writer's descent */
    struct uvas_inner *inner;
    size_t index;
};

struct trail {
    struct step steps[DEPTH_MAX];
    uint32_t depth; /* inner nodes passed */
    struct uvas_leaf *leaf;
};

static void trail_to(uintptr_t end, struct trail *out) {
    struct uvas_node *node = follow(&uvas_book.root);
    out->depth = 0;
    while (node->kind == UVAS_INNER) {
        size_t i = inner_rank(as_inner(node), end - 1);
        out->steps[out->depth++] = (struct step){as_inner(node), i};
        node = follow(&as_inner(node)->child[i]);
    }
    out->leaf = as_leaf(node);
}

/* The pointer that leads to level `depth` of the trail: the root, or a child slot of the node above. */
static uvas_link *slot_above(const struct trail *trail, uint32_t depth) {
    return depth == 0 ? &uvas_book.root : &trail->steps[depth - 1].inner->child[trail->steps[depth - 1].index];
}

static void sketch(struct uvas_leaf *leaf, const struct uvas_entry *entries, size_t count) {
    uint8_t parts[sizeof leaf->sketch.part] = {0};
    uintptr_t low = entries[0].base, last = entries[count - 1].end - 1;
    uint64_t bits = 64 - (uint64_t)__builtin_clzll(last - low + 1), shift = bits > UVAS_SKETCH_BITS ? bits - UVAS_SKETCH_BITS : 0;
    shift += (last >> shift) - (low >> shift) >= sizeof parts; /* where they lie across one part more */
    leaf->shift = shift;
    for (size_t i = 1; i < count; i++) { /* the parts that do not start below the end before, but below this one; the last: all that are left */
        uint64_t part = ((entries[i - 1].end - 1) >> shift) + 1;
        uint64_t until = i + 1 < count ? ((entries[i].end - 1) >> shift) + 1 : (low >> shift) + sizeof parts;
        for (; part < until; part++) {
            parts[part % sizeof parts] = (uint8_t)i;
        }
    }
    for (size_t i = 0; i < sizeof parts / sizeof(uint64_t); i++) {
        uint64_t word;
        memcpy(&word, &parts[i * sizeof word], sizeof word);
        put(&leaf->sketch.word[i], word);
    }
}

/* The inner node right above the leaf; NULL: it is the root. */
static struct uvas_inner *above_leaves(const struct trail *trail) {
    return trail->depth > 0 ? trail->steps[trail->depth - 1].inner : NULL;
}

/* A leaf of entries[from, to). */
static struct uvas_leaf *new_leaf(const struct uvas_entry *entries, size_t count) {
    struct uvas_leaf *leaf = as_leaf(take(&leaves));
    for (size_t i = 0; i < count; i++) {
        put(&leaf->entry[i].end, entries[i].end);
        put(&leaf->entry[i].base, entries[i].base);
        put(&leaf->entry[i].value, entries[i].value);
    }
    for (size_t i = count; i < LEAF_KEYS; i++) {
        put(&leaf->entry[i].end, LAST);
    }
    put(&leaf->entry[count].base, LAST); /* a lookup never looks beyond it */
    sketch(leaf, entries, count);
    return leaf;
}

static size_t read_leaf(const struct uvas_leaf *leaf, struct uvas_entry *entries) {
    size_t count = leaf_count(leaf);
    for (size_t i = 0; i < count; i++) {
        entries[i] = (struct uvas_entry){.base = get(&leaf->entry[i].base), .end = get(&leaf->entry[i].end), .value = get(&leaf->entry[i].value)};
    }
    return count;
}

struct branch { /* a child and the highest end that belongs under it */
    uintptr_t key;
    struct uvas_node *child;
};

static struct uvas_inner *new_inner(const struct branch *branches, size_t count) {
    struct uvas_inner *inner = as_inner(take(&inners));
    inner->first_slot = 1;
    inner->last_slot = 0;
    for (size_t i = 0; i < INNER_CHILDREN; i++) {
        put(&inner->key[i], i + 1 < count ? branches[i].key : LAST);
        publish(&inner->child[i], i < count ? branches[i].child : NULL); /* released one by one: a doomed reader may follow it at once */
    }
    return inner;
}

static size_t read_inner(const struct uvas_inner *inner, struct branch *branches) {
    size_t count = inner_count(inner);
    for (size_t i = 0; i < count; i++) {
        branches[i] = (struct branch){.key = get(&inner->key[i]), .child = follow(&inner->child[i])};
    }
    return count;
}

/* Puts `one`, or `one` and `two` parted by `fence`, in the place of the node at that level of the trail, which is retired. */
static void replace(const struct trail *trail, uint32_t depth, struct uvas_node *old, struct uvas_node *one, uintptr_t fence, struct uvas_node *two) {
    struct branch branches[INNER_CHILDREN + 1];
    if (!two) {
        publish(slot_above(trail, depth), one);
        retire(pool_of(old), old);
        return;
    }
    if (depth == 0) {
        branches[0] = (struct branch){fence, one};
        branches[1] = (struct branch){LAST, two};
        publish(&uvas_book.root, &new_inner(branches, 2)->node);
        retire(pool_of(old), old);
        return;
    }
    struct uvas_inner *parent = trail->steps[depth - 1].inner;
    size_t at = trail->steps[depth - 1].index, count = read_inner(parent, branches);
    memmove(&branches[at + 2], &branches[at + 1], (count - at - 1) * sizeof *branches);
    branches[at + 1] = (struct branch){branches[at].key, two};
    branches[at] = (struct branch){fence, one};
    count++;
    if (count <= INNER_CHILDREN) {
        replace(trail, depth - 1, &parent->node, &new_inner(branches, count)->node, 0, NULL);
    } else {
        size_t half = count / 2;
        struct uvas_inner *low = new_inner(branches, half), *high = new_inner(branches + half, count - half);
        replace(trail, depth - 1, &parent->node, &low->node, branches[half - 1].key, &high->node);
    }
    retire(pool_of(old), old);
}

int uvas_registry_insert(uintptr_t base, uintptr_t end, uint64_t value, struct uvas_entry *taken) {
    struct uvas_entry entries[LEAF_ENTRIES + 1], there;
    assert(base < end && end < LAST);
    if (uvas_registry_next(base, &there) && there.base < end) {
        if (taken) {
            *taken = there;
        }
        return -EEXIST;
    }
    struct uvas_entry fresh = {.base = base, .end = end, .value = value};
    ranges++;
    if (!follow(&uvas_book.root)) {
        publish(&uvas_book.root, &new_leaf(&fresh, 1)->node);
        return 0;
    }
    struct trail trail;
    trail_to(end, &trail);
    size_t count = read_leaf(trail.leaf, entries), at = leaf_rank(trail.leaf, end);
    memmove(&entries[at + 1], &entries[at], (count - at) * sizeof *entries);
    entries[at] = fresh;
    count++;
    if (count <= LEAF_ENTRIES) {
        replace(&trail, trail.depth, &trail.leaf->node, &new_leaf(entries, count)->node, 0, NULL);
    } else {
        size_t half = at + 1 == count ? count - 1 : at == 0 ? 1 : count / 2; /* ranges that come in order leave full leaves behind */
        struct uvas_leaf *low = new_leaf(entries, half), *high = new_leaf(entries + half, count - half);
        hide_cells(above_leaves(&trail));
        replace(&trail, trail.depth, &trail.leaf->node, &low->node, entries[half - 1].end, &high->node);
        mend_guide();
    }
    return 0;
}

static size_t entries_in(struct uvas_node *node) {
    return node->kind == UVAS_LEAF ? leaf_count(as_leaf(node)) : inner_count(as_inner(node));
}

/* Two neighbours fit well into one: with room left, so that an insert soon after does not split it again. */
static bool join(struct uvas_node *first, struct uvas_node *second) {
    size_t most = first->kind == UVAS_LEAF ? LEAF_ENTRIES : INNER_CHILDREN;
    return entries_in(first) + entries_in(second) <= most * 3 / 4;
}

/* The entries of both; `fence` parts them. */
static struct uvas_node *joined(struct uvas_node *first, uintptr_t fence, struct uvas_node *second) {
    struct uvas_entry entries[LEAF_ENTRIES];
    struct branch branches[INNER_CHILDREN];
    if (first->kind == UVAS_LEAF) {
        size_t part = read_leaf(as_leaf(first), entries);
        return &new_leaf(entries, part + read_leaf(as_leaf(second), entries + part))->node;
    }
    size_t part = read_inner(as_inner(first), branches);
    branches[part - 1].key = fence; /* was the last: its fence stood in the parent */
    return &new_inner(branches, part + read_inner(as_inner(second), branches + part))->node;
}

/* The root became `is`: a lone child takes its place; NULL is an empty tree. */
static void shrink_root(struct uvas_node *old, struct uvas_node *is) {
    struct uvas_node *only = is && is->kind == UVAS_INNER && inner_count(as_inner(is)) == 1 ? follow(&as_inner(is)->child[0]) : NULL;
    publish(&uvas_book.root, only ? only : is);
    if (only) {
        retire(&inners, is);
    }
    retire(pool_of(old), old);
}

/* `is` (NULL: nothing is left) takes the place of `old`, joined with a neighbour if both are small; then the parent has become smaller, and so on. */
static void shrink(const struct trail *trail, uint32_t depth, struct uvas_node *old, struct uvas_node *is) {
    struct branch branches[INNER_CHILDREN];
    if (depth == 0) {
        shrink_root(old, is);
        return;
    }
    struct uvas_inner *parent = trail->steps[depth - 1].inner;
    size_t at = trail->steps[depth - 1].index, count = read_inner(parent, branches);
    bool with_right = is && at + 1 < count && join(is, branches[at + 1].child);
    bool with_left = is && !with_right && at > 0 && join(branches[at - 1].child, is);
    if (is && !with_right && !with_left) { /* large enough as it is */
        publish(slot_above(trail, depth), is);
        retire(pool_of(old), old);
        return;
    }
    struct uvas_node *neighbour = with_right ? branches[at + 1].child : with_left ? branches[at - 1].child : NULL;
    if (depth == trail->depth) {
        hide_cells(parent);
    } else if (depth + 1 == trail->depth && neighbour) {
        hide_cells(as_inner(neighbour));
    }
    branches[at].child = is;
    if (neighbour) {
        at -= with_left;
        branches[at + 1].child = joined(branches[at].child, branches[at].key, branches[at + 1].child);
    }
    memmove(&branches[at], &branches[at + 1], (count - at - 1) * sizeof *branches); /* the lower of the two, or the empty one */
    struct uvas_node *smaller = count > 1 ? &new_inner(branches, count - 1)->node : NULL;
    shrink(trail, depth - 1, &parent->node, smaller);
    retire(pool_of(old), old);
    if (neighbour) {
        retire(pool_of(neighbour), neighbour);
        retire(pool_of(is), is); /* never published: it only held the entries */
    }
}

void uvas_registry_remove(uintptr_t base, uintptr_t end) {
    struct uvas_entry entries[LEAF_ENTRIES];
    struct trail trail;
    trail_to(end, &trail);
    size_t count = read_leaf(trail.leaf, entries), at = leaf_rank(trail.leaf, end - 1);
    assert(at < count && entries[at].base == base && entries[at].end == end);
    (void)base;
    memmove(&entries[at], &entries[at + 1], (count - at - 1) * sizeof *entries);
    count--;
    ranges--;
    shrink(&trail, trail.depth, &trail.leaf->node, count ? &new_leaf(entries, count)->node : NULL);
    mend_guide();
}

void uvas_registry_set(uintptr_t base, uintptr_t end, uint64_t value) {
    struct trail trail;
    trail_to(end, &trail);
    size_t at = leaf_rank(trail.leaf, end - 1);
    assert(at < LEAF_ENTRIES && get(&trail.leaf->entry[at].base) == base && get(&trail.leaf->entry[at].end) == end);
    (void)base;
    __atomic_store_n(&trail.leaf->entry[at].value, value, __ATOMIC_RELEASE);
}

/* ---- truth ---------------------------------------------------------------------------------------------------------------------------------------------- */

struct survey {
    size_t entries, leaf_nodes, inner_nodes, depth;
    uintptr_t last_end; /* of the entry before */
    const char *wrong;
    uintptr_t where;
};

static void survey_leaf(const struct uvas_leaf *leaf, uintptr_t above_fence, uintptr_t fence, struct survey *survey) {
    size_t count = leaf_count(leaf);
    survey->leaf_nodes++;
    survey->wrong = count == 0 ? "is an empty leaf" : survey->wrong;
    for (size_t i = 0; i < count && !survey->wrong; i++) {
        uintptr_t base = leaf->entry[i].base, end = leaf->entry[i].end;
        survey->where = base;
        survey->wrong = base >= end ? "ends before it starts" : base < survey->last_end ? "overlaps the one before it" : survey->wrong;
        survey->wrong = end > fence || end <= above_fence ? "is under the wrong fence" : survey->wrong;
        survey->last_end = end;
        survey->entries++;
    }
    for (size_t i = count; i < LEAF_KEYS && !survey->wrong; i++) {
        survey->wrong = leaf->entry[i].end != LAST ? "is followed by a key out of order" : NULL;
    }
}

static void survey_node(const struct uvas_node *node, size_t depth, uintptr_t above_fence, uintptr_t fence, struct survey *survey) {
    if (survey->wrong || !node) {
        survey->wrong = survey->wrong ? survey->wrong : "a child is missing";
    } else if (node->kind == UVAS_LEAF) {
        survey->wrong = survey->depth && survey->depth != depth + 1 ? "leaves lie at different depths" : survey->wrong;
        survey->depth = depth + 1;
        survey_leaf((const struct uvas_leaf *)node, above_fence, fence, survey);
    } else {
        const struct uvas_inner *inner = (const struct uvas_inner *)node;
        size_t count = inner_count(inner);
        survey->inner_nodes++;
        survey->wrong = depth == 0 && count < 2 ? "the root has one child" : depth + 1 >= DEPTH_MAX ? "the tree is too deep" : survey->wrong;
        for (size_t i = 0; i < count; i++) {
            uintptr_t key = i + 1 < count ? inner->key[i] : fence;
            survey->wrong = i + 1 < count && (key <= above_fence || key > fence) ? "a fence is out of order" : survey->wrong;
            survey_node(follow(&inner->child[i]), depth + 1, above_fence, key, survey);
            above_fence = key;
        }
    }
}

static struct survey survey_tree(void) {
    struct survey survey = {0};
    struct uvas_node *root = follow(&uvas_book.root);
    if (root) {
        survey_node(root, 0, 0, LAST, &survey);
    }
    return survey;
}

static void survey_guide(struct survey *survey) {
    for (uint64_t slot = 0; guide && slot <= guide->last && !survey->wrong; slot++) {
        struct place place = place_of(uvas_guide_last_address(guide, slot));
        struct uvas_guide_slot is = slot_of(guide, slot, &place);
        bool tracked = !place.inner || (place.inner->first_slot <= slot && slot <= place.inner->last_slot);
        survey->where = uvas_guide_last_address(guide, slot);
        survey->wrong = guide->slot[slot].cell != is.cell || guide->slot[slot].fence != is.fence ? "the guide misleads" : survey->wrong;
        survey->wrong = !tracked ? "a cell would not be hidden from the guide" : survey->wrong;
    }
}

int uvas_registry_check(char *why, size_t why_size) {
    struct survey survey = survey_tree();
    survey_guide(&survey);
    if (!survey.wrong && survey.entries != ranges) {
        survey.wrong = "the count of ranges is wrong";
    }
    if (!survey.wrong && (survey.leaf_nodes != leaves.taken || survey.inner_nodes != inners.taken)) {
        survey.wrong = "a node is neither in the tree nor retired";
    }
    if (survey.wrong) {
        (void)snprintf(why, why_size, "registry, near 0x%lx: %s", survey.where, survey.wrong);
        return -EINVAL;
    }
    return 0;
}

void uvas_registry_stats(struct uvas_registry_stats *out) {
    struct survey survey = survey_tree();
    *out = (struct uvas_registry_stats){.ranges = ranges, .depth = survey.depth, .leaf_nodes = survey.leaf_nodes, .inner_nodes = survey.inner_nodes,
                                        .tree_bytes = survey.leaf_nodes * sizeof(struct uvas_leaf) + survey.inner_nodes * sizeof(struct uvas_inner),
                                        .node_bytes = leaves.bytes + inners.bytes + guide_bytes};
}

static void forget_pool(struct pool *pool) {
    pool->again = pool->chunks;
    pool->spare = NULL;
    pool->first = pool->last = NULL;
    pool->fresh_nodes = pool->retired = pool->taken = 0;
}

void uvas_registry_forget(void) {
    uvas_book.root = UVAS_NO_LEAF;
    ranges = 0;
    __atomic_store_n(&uvas_book.publications, uvas_book.publications + UVAS_REGISTRY_WINDOW, __ATOMIC_RELEASE);
    if (guide) {
        keep_guide(guide);
    }
    guide = NULL;
    uvas_book.guide.last = 0;
    reshaped = reshaped_enough = 0;
    torn_first = UINT64_MAX;
    torn_last = 0;
    forget_pool(&leaves);
    forget_pool(&inners);
    condition = (pthread_cond_t)PTHREAD_COND_INITIALIZER; /* the parent's waiters are not here */
}
