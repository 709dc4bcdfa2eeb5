/* nodes.c: the memory, the life and the contents of the tree's nodes.
 *
 * Leaves and inner nodes come from pools of their own, as no leaf may ever become an inner node: chunks are carved, and what was retired is made
 * anew, oldest first, once it has rested for WINDOW publications (tree.h says why). Chunks are never given back. Nodes for a change are put by
 * before it begins, with the lock dropped to allocate them, so that nothing in it can fail.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tree.h"
#include "vm.h"

/* Put by before an insert: what it and a following remove can take, and a window's worth, so that nodes rest before they are reused. */
#define NODES_PUT_BY (UVAS_REGISTRY_WINDOW + 4 * UVAS_DEPTH_MAX)
#define CHUNK_NODES 128u
#define CACHE_LINE ((size_t)UVAS_CACHE_LINE)

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

struct uvas_book uvas_book = {.root = UVAS_NO_LEAF};
static struct pool leaves = {.kind = UVAS_LEAF, .node_bytes = sizeof(struct uvas_leaf)};
static struct pool inners = {.kind = UVAS_INNER, .node_bytes = sizeof(struct uvas_inner)};

/* ---- life -------------------------------------------------------------------------------------------------------------------------------------- */

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

int uvas_nodes_put_by(void) {
    struct pool *lacking = !has_put_by(&leaves) ? &leaves : !has_put_by(&inners) ? &inners : NULL;
    return !lacking ? 1 : put_by(lacking) ? 0 : -ENOMEM;
}

void uvas_node_retire(struct uvas_node *node) {
    retire(node->kind == UVAS_LEAF ? &leaves : &inners, node);
}

struct uvas_node_counts uvas_nodes_count(void) {
    return (struct uvas_node_counts){.leaves = leaves.taken, .inners = inners.taken, .bytes = leaves.bytes + inners.bytes};
}

static void forget_pool(struct pool *pool) {
    pool->again = pool->chunks;
    pool->spare = NULL;
    pool->first = pool->last = NULL;
    pool->fresh_nodes = pool->retired = pool->taken = 0;
}

void uvas_nodes_forget(void) {
    forget_pool(&leaves);
    forget_pool(&inners);
}

/* ---- contents ---------------------------------------------------------------------------------------------------------------------------------- */

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
        uvas_word_put(&leaf->sketch.word[i], word);
    }
}


struct uvas_leaf *uvas_leaf_make(const struct uvas_entry *entries, size_t count) {
    struct uvas_leaf *leaf = uvas_as_leaf(take(&leaves));
    for (size_t i = 0; i < count; i++) {
        uvas_word_put(&leaf->entry[i].end, entries[i].end);
        uvas_word_put(&leaf->entry[i].base, entries[i].base);
        uvas_word_put(&leaf->entry[i].value, entries[i].value);
    }
    for (size_t i = count; i < UVAS_LEAF_KEYS; i++) {
        uvas_word_put(&leaf->entry[i].end, UVAS_NO_KEY);
    }
    uvas_word_put(&leaf->entry[count].base, UVAS_NO_KEY); /* a lookup never looks beyond it */
    sketch(leaf, entries, count);
    return leaf;
}

size_t uvas_leaf_read(const struct uvas_leaf *leaf, struct uvas_entry *entries) {
    size_t count = uvas_leaf_count(leaf);
    for (size_t i = 0; i < count; i++) {
        const struct uvas_entry *entry = &leaf->entry[i];
        entries[i] = (struct uvas_entry){.base = uvas_word(&entry->base), .end = uvas_word(&entry->end), .value = uvas_word(&entry->value)};
    }
    return count;
}

struct uvas_inner *uvas_inner_make(const struct uvas_branch *branches, size_t count) {
    struct uvas_inner *inner = uvas_as_inner(take(&inners));
    inner->first_slot = 1;
    inner->last_slot = 0;
    for (size_t i = 0; i < UVAS_INNER_CHILDREN; i++) {
        uvas_word_put(&inner->key[i], i + 1 < count ? branches[i].key : UVAS_NO_KEY);
        uvas_tree_publish(&inner->child[i], i < count ? branches[i].child : NULL); /* released one by one: a doomed reader may follow it at once */
    }
    return inner;
}

size_t uvas_inner_read(const struct uvas_inner *inner, struct uvas_branch *branches) {
    size_t count = uvas_inner_count(inner);
    for (size_t i = 0; i < count; i++) {
        branches[i] = (struct uvas_branch){.key = uvas_word(&inner->key[i]), .child = uvas_tree_follow(&inner->child[i])};
    }
    return count;
}
