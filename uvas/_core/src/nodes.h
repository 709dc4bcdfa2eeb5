/* nodes.h: what the registry's tree is made of, and the quick lookup in it, which its callers' compilers see through. tree.h has the rest, and
 * says why a reader may trust what it read.
 *
 * The quick lookup descends nothing: the guide (guide.h) names a leaf, the leaf's sketch an entry, and the entry proves itself: it holds the address,
 * or it and the one before it lie on both sides. Where that fails, the caller asks lookup.c. It takes no branch that depends on what was guessed.
 */
#ifndef UVAS_NODES_H
#define UVAS_NODES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guide.h"
#include "registry.h"

#define UVAS_LEAF_KEYS 32u
#define UVAS_LEAF_ENTRIES (UVAS_LEAF_KEYS - 1) /* behind the last there is always a UVAS_NO_KEY */
#define UVAS_INNER_CHILDREN 32u /* 16 to 64 were tried: 32 was the quickest from 100 to a million ranges */
#define UVAS_SKETCH_BITS 6u
#define UVAS_CACHE_LINE 64u
#define UVAS_NO_KEY UINTPTR_MAX

enum uvas_node_kind { UVAS_LEAF = 1, UVAS_INNER = 2 };

/* `kind` is written once, plainly, when the node is carved from its chunk; readers read it plainly: if a pointer were published or followed without
 * ordering, ThreadSanitizer would see it here. `next` and `stamp` are the writer's, under the lock. */
struct uvas_node {
    uint32_t kind;
    uint64_t stamp;         /* the clock when it was retired */
    struct uvas_node *next; /* retired after this one */
};

/* What leads to a node: its address, and in the bits that alignment leaves free the shift of the leaf's sketch, so that a lookup need not wait for the
 * leaf to know where in it to look; UVAS_NO_LEAF: an inner node or, without an address, nothing. */
typedef uintptr_t uvas_link;
#define UVAS_NO_LEAF ((uvas_link)(UVAS_CACHE_LINE - 1))

/* All words of leaves and inner nodes: written under the lock (relaxed), before the node is published or after its rest; read by anyone (relaxed).
 *
 * The sketch divides addresses into parts of 1 << shift bytes, so large that it has a byte for each part between the leaf's first base and last end:
 * an address's part modulo their number. The byte says how many entries end at or below the part's first address. What is in a part ends there, or
 * one entry later, unless two ends lie in one part. */
struct uvas_leaf {
    _Alignas(UVAS_CACHE_LINE) struct uvas_node node;
    uint64_t shift; /* the writer's, under the lock: for links */
    uint64_t unused[4];
    union {
        uint8_t part[1u << UVAS_SKETCH_BITS];
        uint64_t word[(1u << UVAS_SKETCH_BITS) / 8]; /* as it is written */
    } sketch;
    struct uvas_entry entry[UVAS_LEAF_KEYS]; /* by ascending end; behind the last one base and then all ends are UVAS_NO_KEY. A value may also be
                                              * replaced in place, under the lock (release) */
};

struct uvas_inner {
    _Alignas(UVAS_CACHE_LINE) struct uvas_node node;
    uint32_t first_slot, last_slot; /* of the guide, that may name a cell in here; none: first > last. The writer's, under the lock */
    uintptr_t key[UVAS_INNER_CHILDREN];            /* ascending; the last child's and the unused are UVAS_NO_KEY */
    uvas_link child[UVAS_INNER_CHILDREN];          /* swung in place under the lock (release); read by anyone (acquire) */
};

_Static_assert(sizeof(struct uvas_inner) % UVAS_CACHE_LINE == 0, "links have bits to spare");
_Static_assert(offsetof(struct uvas_leaf, entry) == 2 * UVAS_CACHE_LINE && sizeof(struct uvas_leaf) % UVAS_CACHE_LINE == 0, "whole cache lines");

/* What a lookup starts from: one cache line. Written under the lock (release), read by anyone (acquire). */
struct uvas_book {
    _Alignas(UVAS_CACHE_LINE) uint64_t publications; /* the clock */
    uvas_link root;
    struct uvas_guide_view guide;
};
extern struct uvas_book uvas_book;

static inline uint64_t uvas_word(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* A guess: the leaf's entry that holds the address or is the next above it, or NULL. */
static inline __attribute__((always_inline)) const struct uvas_entry *uvas_book_guess(uintptr_t address, const struct uvas_leaf **in) {
    void *cell;
    if (!uvas_guide_cell(&uvas_book.guide, address, &cell)) {
        return NULL;
    }
    uvas_link link = __atomic_load_n((const uvas_link *)cell, __ATOMIC_ACQUIRE);
    const struct uvas_leaf *leaf = *in = (const struct uvas_leaf *)(link & ~UVAS_NO_LEAF);
    if ((link & UVAS_NO_LEAF) == UVAS_NO_LEAF || leaf->node.kind != UVAS_LEAF) {
        return NULL;
    }
    uint64_t part = address >> (link & UVAS_NO_LEAF) & (sizeof leaf->sketch.part - 1);
    const struct uvas_entry *entry = &leaf->entry[__atomic_load_n(&leaf->sketch.part[part], __ATOMIC_RELAXED)];
    return entry + (uvas_word(&entry->end) <= address);
}

static inline uint64_t uvas_book_clock(void) {
    return __atomic_load_n(&uvas_book.publications, __ATOMIC_ACQUIRE);
}

/* Nothing that was read since the clock was `started` has been rewritten. */
static inline bool uvas_book_stood(uint64_t started) {
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return uvas_word(&uvas_book.publications) - started < UVAS_REGISTRY_WINDOW;
}

/* Whether a guess proves to be the entry that holds the address and is not hidden; if not, there may be one all the same. */
static inline __attribute__((always_inline)) bool uvas_book_holds(uintptr_t address, struct uvas_entry *out) {
    const struct uvas_leaf *leaf;
    uint64_t started = uvas_book_clock();
    const struct uvas_entry *entry = uvas_book_guess(address, &leaf);
    if (!entry) {
        return false;
    }
    out->base = uvas_word(&entry->base);
    out->end = uvas_word(&entry->end);
    out->value = __atomic_load_n(&entry->value, __ATOMIC_ACQUIRE);
    return address - out->base < out->end - out->base && !(out->value & UVAS_REGISTRY_HIDDEN) && uvas_book_stood(started);
}

#endif
