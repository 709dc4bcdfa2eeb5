/* tree.h: the registry's tree as its own rooms see it. Private to them:
 *
 *   lock.c      the core's one lock
 *   nodes.c     where nodes come from and go to, and what is written into them
 *   guide.c     keeps the guide in step with the tree
 *   lookup.c    readers: no lock, no stores
 *   registry.c  writers: insert, remove, set
 *   survey.c    whether all that is as it should be
 *
 * A B+tree keyed by end address. Inner node: child i holds the ranges whose ends lie in (key[i-1], key[i]]; the last key is the greatest number, and
 * so are unused keys, so that a search needs no count and always takes the same steps: a mispredicted branch would cost more than they do. Keys of
 * a published node never change. A change makes a new leaf and swings one pointer of its parent (or the root) to it; only a split or a merge makes
 * a new parent. So a reader, wherever it stands, sees each node as it was when it was published, or with newer children.
 *
 * Why a reader may trust what it read. Node N is unlinked, then stamped with ++clock (release), and rewritten only when clock >= stamp + WINDOW:
 * the writer has stored that clock, then a release fence, then N's words. A reader loads the clock s (acquire) and descends. If it got to N, N was
 * linked after that load, so stamp > s. If it read a rewritten word of N, its acquire fence at the end pairs with the writer's release fence, and
 * its second load of the clock gives at least stamp + WINDOW > s + WINDOW: it starts over. A doomed reader does no harm on the way: nodes are never
 * unmapped, a leaf never becomes an inner node, every pointer in a node is or was one to a node, and a descent has at most DEPTH_MAX steps.
 */
#ifndef UVAS_TREE_H
#define UVAS_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nodes.h"
#include "registry.h"

#define UVAS_DEPTH_MAX 12u /* 16 million ranges in leaves and inner nodes a quarter full need 6 */
#define UVAS_RANK_BLOCK 8u /* keys that are compared side by side: a cache line */
/* A lookup is short, and its callers pass constants: the compiler is to see through it. */
#define UVAS_ALWAYS_INLINE static inline __attribute__((always_inline))

/* -- words -- */

static inline void uvas_word_put(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline struct uvas_node *uvas_tree_follow(const uvas_link *link) {
    return (struct uvas_node *)(__atomic_load_n(link, __ATOMIC_ACQUIRE) & ~UVAS_NO_LEAF);
}

static inline void uvas_tree_publish(uvas_link *link, struct uvas_node *node) {
    uint64_t shift = node && node->kind == UVAS_LEAF ? ((const struct uvas_leaf *)node)->shift : UVAS_NO_LEAF;
    __atomic_store_n(link, (uintptr_t)node | shift, __ATOMIC_RELEASE);
}

static inline struct uvas_leaf *uvas_as_leaf(struct uvas_node *node) {
    return (struct uvas_leaf *)node;
}

static inline struct uvas_inner *uvas_as_inner(struct uvas_node *node) {
    return (struct uvas_inner *)node;
}

/* How many of the ascending keys are <= address: first which block of eight, then where in it. No branch depends on what is read, and the comparisons
 * of a block do not wait for each other. */
UVAS_ALWAYS_INLINE size_t uvas_rank(const uint64_t *keys, size_t stride, size_t blocks, uintptr_t address) {
    size_t block = 0, within = 0;
    for (size_t i = 1; i < blocks; i++) {
        block += uvas_word(&keys[(i * UVAS_RANK_BLOCK - 1) * stride]) <= address;
    }
    keys += block * UVAS_RANK_BLOCK * stride;
#pragma GCC unroll 8
    for (size_t i = 0; i < UVAS_RANK_BLOCK; i++) {
        within += uvas_word(&keys[i * stride]) <= address;
    }
    return block * UVAS_RANK_BLOCK + within;
}

UVAS_ALWAYS_INLINE size_t uvas_inner_rank(const struct uvas_inner *inner, uintptr_t address) {
    return uvas_rank(inner->key, 1, UVAS_INNER_CHILDREN / UVAS_RANK_BLOCK, address);
}

UVAS_ALWAYS_INLINE size_t uvas_leaf_rank(const struct uvas_leaf *leaf, uintptr_t address) {
    size_t first = offsetof(struct uvas_entry, end) / sizeof(uint64_t), stride = sizeof(struct uvas_entry) / sizeof(uint64_t);
    return uvas_rank((const uint64_t *)leaf->entry + first, stride, UVAS_LEAF_KEYS / UVAS_RANK_BLOCK, address);
}

/* How many are in it. Under the lock. */
static inline size_t uvas_leaf_count(const struct uvas_leaf *leaf) {
    return uvas_leaf_rank(leaf, UVAS_NO_KEY - 1);
}

static inline size_t uvas_inner_count(const struct uvas_inner *inner) {
    return uvas_inner_rank(inner, UVAS_NO_KEY - 1) + 1; /* the last child's key is UVAS_NO_KEY too */
}

/* The first node of the lowest level under `node`: its leftmost or rightmost leaf; NULL for a doomed reader. */
static inline struct uvas_leaf *uvas_edge_leaf(struct uvas_node *node, bool rightmost) {
    for (uint32_t depth = 0; node && depth < UVAS_DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            return uvas_as_leaf(node);
        }
        size_t i = rightmost ? uvas_inner_rank(uvas_as_inner(node), UVAS_NO_KEY - 1) : 0;
        node = uvas_tree_follow(&uvas_as_inner(node)->child[i % UVAS_INNER_CHILDREN]);
    }
    return NULL;
}

/* -- lock.c: what registry.h declares, and -- */

void uvas_lock_forget(void); /* the child of a fork: the parent's waiters are not here */

/* -- nodes.c: under the lock -- */

struct uvas_branch { /* a child and the highest end that belongs under it */
    uintptr_t key;
    struct uvas_node *child;
};

struct uvas_node_counts {
    size_t leaves, inners; /* made and not retired */
    size_t bytes;          /* taken from the kernel for all there ever were */
};

/* For what an insert and a following remove can take. 1: enough are put by; 0: some were, and the lock was dropped meanwhile; -ENOMEM without the
 * lock. */
int uvas_nodes_put_by(void);
/* A node of what is put by, with so many entries or branches; not published yet. */
struct uvas_leaf *uvas_leaf_make(const struct uvas_entry *entries, size_t count);
struct uvas_inner *uvas_inner_make(const struct uvas_branch *branches, size_t count);
size_t uvas_leaf_read(const struct uvas_leaf *leaf, struct uvas_entry *entries);
size_t uvas_inner_read(const struct uvas_inner *inner, struct uvas_branch *branches);
/* It has just been unlinked, or was never published: rests, and is made anew. */
void uvas_node_retire(struct uvas_node *node);
struct uvas_node_counts uvas_nodes_count(void);
void uvas_nodes_forget(void); /* the child of a fork: all of them are free again */

/* -- registry.c -- */

extern size_t uvas_tree_ranges; /* in the tree; under the lock */

#endif
