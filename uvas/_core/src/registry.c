/* registry.c: changes of the book (registry.h), under the lock: an insert, a remove, another value. tree.h says what readers see meanwhile.
 */
#include "registry.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "tree.h"

size_t uvas_tree_ranges;

int uvas_registry_lock_for_insert(void) {
    uvas_registry_lock();
    for (;;) {
        int enough = uvas_nodes_put_by();
        if (enough < 0) {
            return enough;
        }
        if (enough && !uvas_guide_renew()) {
            return 0;
        }
    }
}

/* ---- where a change goes ----------------------------------------------------------------------------------------------------------------------- */

struct step { /* one level of a writer's descent */
    struct uvas_inner *inner;
    size_t index;
};

struct trail {
    struct step steps[UVAS_DEPTH_MAX];
    uint32_t depth; /* inner nodes passed */
    struct uvas_leaf *leaf;
};

static void trail_to(uintptr_t end, struct trail *out) {
    struct uvas_node *node = uvas_tree_follow(&uvas_book.root);
    out->depth = 0;
    while (node->kind == UVAS_INNER) {
        size_t i = uvas_inner_rank(uvas_as_inner(node), end - 1);
        out->steps[out->depth++] = (struct step){uvas_as_inner(node), i};
        node = uvas_tree_follow(&uvas_as_inner(node)->child[i]);
    }
    out->leaf = uvas_as_leaf(node);
}

/* The pointer that leads to level `depth` of the trail: the root, or a child slot of the node above. */
static uvas_link *slot_above(const struct trail *trail, uint32_t depth) {
    return depth == 0 ? &uvas_book.root : &trail->steps[depth - 1].inner->child[trail->steps[depth - 1].index];
}

/* The inner node right above the leaf; NULL: it is the root. */
static struct uvas_inner *above_leaves(const struct trail *trail) {
    return trail->depth > 0 ? trail->steps[trail->depth - 1].inner : NULL;
}


/* ---- insert ------------------------------------------------------------------------------------------------------------------------------------ */

/* Puts `one`, or `one` and `two` parted by `fence`, in the place of the node at that level of the trail, which is retired. */
static void replace(const struct trail *trail, uint32_t depth, struct uvas_node *old, struct uvas_node *one, uintptr_t fence, struct uvas_node *two) {
    struct uvas_branch branches[UVAS_INNER_CHILDREN + 1];
    if (!two) {
        uvas_tree_publish(slot_above(trail, depth), one);
        uvas_node_retire(old);
        return;
    }
    if (depth == 0) {
        branches[0] = (struct uvas_branch){fence, one};
        branches[1] = (struct uvas_branch){UVAS_NO_KEY, two};
        uvas_tree_publish(&uvas_book.root, &uvas_inner_make(branches, 2)->node);
        uvas_node_retire(old);
        return;
    }
    struct uvas_inner *parent = trail->steps[depth - 1].inner;
    size_t at = trail->steps[depth - 1].index, count = uvas_inner_read(parent, branches);
    memmove(&branches[at + 2], &branches[at + 1], (count - at - 1) * sizeof *branches);
    branches[at + 1] = (struct uvas_branch){branches[at].key, two};
    branches[at] = (struct uvas_branch){fence, one};
    count++;
    if (count <= UVAS_INNER_CHILDREN) {
        replace(trail, depth - 1, &parent->node, &uvas_inner_make(branches, count)->node, 0, NULL);
    } else {
        size_t half = count / 2;
        struct uvas_inner *low = uvas_inner_make(branches, half), *high = uvas_inner_make(branches + half, count - half);
        replace(trail, depth - 1, &parent->node, &low->node, branches[half - 1].key, &high->node);
    }
    uvas_node_retire(old);
}

int uvas_registry_insert(uintptr_t base, uintptr_t end, uint64_t value, struct uvas_entry *taken) {
    struct uvas_entry entries[UVAS_LEAF_ENTRIES + 1], there;
    assert(base < end && end < UVAS_NO_KEY);
    if (uvas_registry_next(base, &there) && there.base < end) {
        if (taken) {
            *taken = there;
        }
        return -EEXIST;
    }
    struct uvas_entry fresh = {.base = base, .end = end, .value = value};
    uvas_tree_ranges++;
    if (!uvas_tree_follow(&uvas_book.root)) {
        uvas_tree_publish(&uvas_book.root, &uvas_leaf_make(&fresh, 1)->node);
        return 0;
    }
    struct trail trail;
    trail_to(end, &trail);
    size_t count = uvas_leaf_read(trail.leaf, entries), at = uvas_leaf_rank(trail.leaf, end);
    memmove(&entries[at + 1], &entries[at], (count - at) * sizeof *entries);
    entries[at] = fresh;
    count++;
    if (count <= UVAS_LEAF_ENTRIES) {
        replace(&trail, trail.depth, &trail.leaf->node, &uvas_leaf_make(entries, count)->node, 0, NULL);
    } else {
        size_t half = at + 1 == count ? count - 1 : at == 0 ? 1 : count / 2; /* ranges that come in order leave full leaves behind */
        struct uvas_leaf *low = uvas_leaf_make(entries, half), *high = uvas_leaf_make(entries + half, count - half);
        uvas_guide_hide(above_leaves(&trail));
        replace(&trail, trail.depth, &trail.leaf->node, &low->node, entries[half - 1].end, &high->node);
        uvas_guide_mend();
    }
    return 0;
}

/* ---- remove ------------------------------------------------------------------------------------------------------------------------------------ */

static size_t entries_in(struct uvas_node *node) {
    return node->kind == UVAS_LEAF ? uvas_leaf_count(uvas_as_leaf(node)) : uvas_inner_count(uvas_as_inner(node));
}

/* Two neighbours fit well into one: with room left, so that an insert soon after does not split it again. */
static bool join(struct uvas_node *first, struct uvas_node *second) {
    size_t most = first->kind == UVAS_LEAF ? UVAS_LEAF_ENTRIES : UVAS_INNER_CHILDREN;
    return entries_in(first) + entries_in(second) <= most * 3 / 4;
}

/* The entries of both; `fence` parts them. */
static struct uvas_node *joined(struct uvas_node *first, uintptr_t fence, struct uvas_node *second) {
    struct uvas_entry entries[UVAS_LEAF_ENTRIES];
    struct uvas_branch branches[UVAS_INNER_CHILDREN];
    if (first->kind == UVAS_LEAF) {
        size_t part = uvas_leaf_read(uvas_as_leaf(first), entries);
        return &uvas_leaf_make(entries, part + uvas_leaf_read(uvas_as_leaf(second), entries + part))->node;
    }
    size_t part = uvas_inner_read(uvas_as_inner(first), branches);
    branches[part - 1].key = fence; /* was the last: its fence stood in the parent */
    return &uvas_inner_make(branches, part + uvas_inner_read(uvas_as_inner(second), branches + part))->node;
}

/* The root became `is`: a lone child takes its place; NULL is an empty tree. */
static void shrink_root(struct uvas_node *old, struct uvas_node *is) {
    bool lone = is && is->kind == UVAS_INNER && uvas_inner_count(uvas_as_inner(is)) == 1;
    struct uvas_node *only = lone ? uvas_tree_follow(&uvas_as_inner(is)->child[0]) : NULL;
    uvas_tree_publish(&uvas_book.root, only ? only : is);
    if (only) {
        uvas_node_retire(is);
    }
    uvas_node_retire(old);
}

/* `is` (NULL: nothing is left) takes the place of `old`, joined with a neighbour if both are small; then the parent has become smaller, and so on. */
static void shrink(const struct trail *trail, uint32_t depth, struct uvas_node *old, struct uvas_node *is) {
    struct uvas_branch branches[UVAS_INNER_CHILDREN];
    if (depth == 0) {
        shrink_root(old, is);
        return;
    }
    struct uvas_inner *parent = trail->steps[depth - 1].inner;
    size_t at = trail->steps[depth - 1].index, count = uvas_inner_read(parent, branches);
    bool with_right = is && at + 1 < count && join(is, branches[at + 1].child);
    bool with_left = is && !with_right && at > 0 && join(branches[at - 1].child, is);
    if (is && !with_right && !with_left) { /* large enough as it is */
        uvas_tree_publish(slot_above(trail, depth), is);
        uvas_node_retire(old);
        return;
    }
    struct uvas_node *neighbour = with_right ? branches[at + 1].child : with_left ? branches[at - 1].child : NULL;
    if (depth == trail->depth) {
        uvas_guide_hide(parent);
    } else if (depth + 1 == trail->depth && neighbour) {
        uvas_guide_hide(uvas_as_inner(neighbour));
    }
    branches[at].child = is;
    if (neighbour) {
        at -= with_left;
        branches[at + 1].child = joined(branches[at].child, branches[at].key, branches[at + 1].child);
    }
    memmove(&branches[at], &branches[at + 1], (count - at - 1) * sizeof *branches); /* the lower of the two, or the empty one */
    struct uvas_node *smaller = count > 1 ? &uvas_inner_make(branches, count - 1)->node : NULL;
    shrink(trail, depth - 1, &parent->node, smaller);
    uvas_node_retire(old);
    if (neighbour) {
        uvas_node_retire(neighbour);
        uvas_node_retire(is); /* never published: it only held the entries */
    }
}

void uvas_registry_remove(uintptr_t base, uintptr_t end) {
    struct uvas_entry entries[UVAS_LEAF_ENTRIES];
    struct trail trail;
    trail_to(end, &trail);
    size_t count = uvas_leaf_read(trail.leaf, entries), at = uvas_leaf_rank(trail.leaf, end - 1);
    assert(at < count && entries[at].base == base && entries[at].end == end);
    (void)base;
    memmove(&entries[at], &entries[at + 1], (count - at - 1) * sizeof *entries);
    count--;
    uvas_tree_ranges--;
    shrink(&trail, trail.depth, &trail.leaf->node, count ? &uvas_leaf_make(entries, count)->node : NULL);
    uvas_guide_mend();
}

void uvas_registry_set(uintptr_t base, uintptr_t end, uint64_t value) {
    struct trail trail;
    trail_to(end, &trail);
    size_t at = uvas_leaf_rank(trail.leaf, end - 1);
    assert(at < UVAS_LEAF_ENTRIES && uvas_word(&trail.leaf->entry[at].base) == base && uvas_word(&trail.leaf->entry[at].end) == end);
    (void)base;
    __atomic_store_n(&trail.leaf->entry[at].value, value, __ATOMIC_RELEASE);
}

void uvas_registry_forget(void) {
    uvas_book.root = UVAS_NO_LEAF;
    uvas_tree_ranges = 0;
    __atomic_store_n(&uvas_book.publications, uvas_book.publications + UVAS_REGISTRY_WINDOW, __ATOMIC_RELEASE);
    uvas_guide_forget();
    uvas_nodes_forget();
    uvas_lock_forget();
}
