/* survey.c: whether the registry is what it says: order, disjointness, fill, depth, counts, fences, and the guide. Under the lock.
 */
#include <errno.h>
#include <stdio.h>

#include "tree.h"

struct survey {
    size_t entries, leaf_nodes, inner_nodes, depth;
    uintptr_t last_end; /* of the entry before */
    const char *wrong;
    uintptr_t where;
};

static void survey_leaf(const struct uvas_leaf *leaf, uintptr_t above_fence, uintptr_t fence, struct survey *survey) {
    size_t count = uvas_leaf_count(leaf);
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
    for (size_t i = count; i < UVAS_LEAF_KEYS && !survey->wrong; i++) {
        survey->wrong = leaf->entry[i].end != UVAS_NO_KEY ? "is followed by a key out of order" : NULL;
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
        size_t count = uvas_inner_count(inner);
        survey->inner_nodes++;
        survey->wrong = depth == 0 && count < 2 ? "the root has one child" : depth + 1 >= UVAS_DEPTH_MAX ? "the tree is too deep" : survey->wrong;
        for (size_t i = 0; i < count; i++) {
            uintptr_t key = i + 1 < count ? inner->key[i] : fence;
            survey->wrong = i + 1 < count && (key <= above_fence || key > fence) ? "a fence is out of order" : survey->wrong;
            survey_node(uvas_tree_follow(&inner->child[i]), depth + 1, above_fence, key, survey);
            above_fence = key;
        }
    }
}

static struct survey survey_tree(void) {
    struct survey survey = {0};
    struct uvas_node *root = uvas_tree_follow(&uvas_book.root);
    if (root) {
        survey_node(root, 0, 0, UVAS_NO_KEY, &survey);
    }
    return survey;
}

int uvas_registry_check(char *why, size_t why_size) {
    struct uvas_node_counts counts = uvas_nodes_count();
    struct survey survey = survey_tree();
    if (!survey.wrong) {
        survey.wrong = uvas_guide_check(&survey.where);
    }
    if (!survey.wrong && survey.entries != uvas_tree_ranges) {
        survey.wrong = "the count of ranges is wrong";
    }
    if (!survey.wrong && (survey.leaf_nodes != counts.leaves || survey.inner_nodes != counts.inners)) {
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
    *out = (struct uvas_registry_stats){.ranges = uvas_tree_ranges, .depth = survey.depth,
                                        .leaf_nodes = survey.leaf_nodes, .inner_nodes = survey.inner_nodes,
                                        .tree_bytes = survey.leaf_nodes * sizeof(struct uvas_leaf) + survey.inner_nodes * sizeof(struct uvas_inner),
                                        .node_bytes = uvas_nodes_count().bytes + uvas_guide_bytes()};
}
