/* lookup.c: which range holds an address, which comes next, which came before. No lock, no stores: any thread, also in a signal handler. tree.h says
 * why what is read may be trusted; nodes.h has the quick lookup that is tried first.
 */
#include "tree.h"

struct path { /* where a descent went */
    struct uvas_leaf *leaf;
    struct uvas_node *left, *right; /* the subtrees next to it, or NULL */
};

UVAS_ALWAYS_INLINE struct path descend(uintptr_t address) {
    struct path path = {NULL, NULL, NULL};
    struct uvas_node *node = uvas_tree_follow(&uvas_book.root);
    for (uint32_t depth = 0; node && depth < UVAS_DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            path.leaf = uvas_as_leaf(node);
            break;
        }
        struct uvas_inner *inner = uvas_as_inner(node);
        size_t i = uvas_inner_rank(inner, address);
        if (i >= UVAS_INNER_CHILDREN) { /* a node that is being rewritten */
            break;
        }
        path.left = i > 0 ? uvas_tree_follow(&inner->child[i - 1]) : path.left;
        struct uvas_node *right = i + 1 < UVAS_INNER_CHILDREN ? uvas_tree_follow(&inner->child[i + 1]) : NULL;
        path.right = right ? right : path.right;
        node = uvas_tree_follow(&inner->child[i]);
    }
    return path;
}

static inline void copy_out(const struct uvas_leaf *leaf, size_t i, struct uvas_entry *out) {
    out->end = uvas_word(&leaf->entry[i].end);
    out->base = uvas_word(&leaf->entry[i].base);
    out->value = __atomic_load_n(&leaf->entry[i].value, __ATOMIC_ACQUIRE);
}

/* The lowest entry that ends above the address. */
UVAS_ALWAYS_INLINE bool above(uintptr_t address, struct uvas_entry *out) {
    struct path path = descend(address);
    if (!path.leaf) {
        return false;
    }
    size_t i = uvas_leaf_rank(path.leaf, address);
    if (i < UVAS_LEAF_ENTRIES && uvas_word(&path.leaf->entry[i].end) != UVAS_NO_KEY) {
        copy_out(path.leaf, i, out);
        return true;
    }
    struct uvas_leaf *next = path.right ? uvas_edge_leaf(path.right, false) : NULL; /* its fence lies above, its ranges do not */
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
    size_t i = uvas_leaf_rank(path.leaf, address);
    if (i < UVAS_LEAF_ENTRIES && uvas_word(&path.leaf->entry[i].end) != UVAS_NO_KEY && uvas_word(&path.leaf->entry[i].base) < address) {
        copy_out(path.leaf, i, out);
        return true;
    }
    if (i == UVAS_LEAF_ENTRIES || uvas_word(&path.leaf->entry[i].end) == UVAS_NO_KEY) { /* the one that covers it may be the next leaf's first */
        struct uvas_leaf *next = path.right ? uvas_edge_leaf(path.right, false) : NULL;
        if (next && uvas_word(&next->entry[0].base) < address) {
            copy_out(next, 0, out);
            return true;
        }
    }
    struct uvas_leaf *leaf = i > 0 ? path.leaf : path.left ? uvas_edge_leaf(path.left, true) : NULL;
    if (leaf) {
        i = leaf == path.leaf ? i : uvas_leaf_rank(leaf, UVAS_NO_KEY - 1);
        copy_out(leaf, i > 0 ? i - 1 : 0, out);
    }
    return leaf != NULL;
}

/* Looks until nothing that was read can have been rewritten meanwhile. */
UVAS_ALWAYS_INLINE int settled(bool (*look)(uintptr_t, struct uvas_entry *), uintptr_t address, struct uvas_entry *out) {
    for (;;) {
        uint64_t started = __atomic_load_n(&uvas_book.publications, __ATOMIC_ACQUIRE);
        struct uvas_entry seen;
        bool found = look(address, &seen);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__builtin_expect(uvas_word(&uvas_book.publications) - started < UVAS_REGISTRY_WINDOW, 1)) {
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
UVAS_ALWAYS_INLINE struct uvas_leaf *leaf_of(uintptr_t address) {
    struct uvas_node *node = uvas_tree_follow(&uvas_book.root);
    for (uint32_t depth = 0; node && depth < UVAS_DEPTH_MAX; depth++) {
        if (node->kind == UVAS_LEAF) {
            return uvas_as_leaf(node);
        }
        size_t i = uvas_inner_rank(uvas_as_inner(node), address);
        node = i < UVAS_INNER_CHILDREN ? uvas_tree_follow(&uvas_as_inner(node)->child[i]) : NULL;
    }
    return NULL;
}

/* As `above`, but most addresses end in the first leaf, and then no neighbour has to be known. */
UVAS_ALWAYS_INLINE bool holder(uintptr_t address, struct uvas_entry *out) {
    struct uvas_leaf *leaf = leaf_of(address);
    size_t i = leaf ? uvas_leaf_rank(leaf, address) : UVAS_LEAF_ENTRIES;
    if (i < UVAS_LEAF_ENTRIES && uvas_word(&leaf->entry[i].end) != UVAS_NO_KEY) {
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
    if (!entry || uvas_word(&entry->end) == UVAS_NO_KEY) {
        return false;
    }
    uintptr_t base = uvas_word(&entry->base);
    bool between = address < base && entry > leaf->entry && uvas_word(&entry[-1].end) <= address;
    bool hidden = address - base < uvas_word(&entry->end) - base && __atomic_load_n(&entry->value, __ATOMIC_ACQUIRE) & UVAS_REGISTRY_HIDDEN;
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
