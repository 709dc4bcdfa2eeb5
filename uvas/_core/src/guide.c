/* guide.c: the guide (guide.h): its shape, and how it is kept in step with the tree. Under the lock, all of it.
 *
 * A change that takes a node from above the leaves hides, before it is published, what the guide knows of that node, and mends the torn slots after.
 * When enough leaves have been split and joined, the table is laid anew, finer or elsewhere, before the next insert.
 */
#include <assert.h>

#include "tree.h"
#include "vm.h"

#define SLOTS_PER_LEAF 2u /* at least; the table's size is a power of two */
#define SHIFT_LEAST 12u
#define SLACK_PART 8u /* room for ranges to come, on each side, of the window */
#define SLACK_MOST UINT64_C(32)
#define FAR_APART 4u /* the whole over the middle three quarters: beyond it, the ends are left out */
#define ANYWHERE ((uintptr_t)1 << 62) /* no address of ours is as high */
#define RESHAPED_PART 16u /* the guide is laid anew when that part of the leaves have been split or joined: for each, so many times its slots are written */

uintptr_t uvas_guide_nothing = UVAS_NO_LEAF;
static struct uvas_guide *guide;       /* NULL: none yet; under the lock, as what follows */
static struct uvas_guide *guides_kept;
static size_t bytes_made;              /* of all guides ever made */
static size_t reshaped, reshaped_enough; /* leaves split, joined and gone since the guide was laid, and how many call for another */
static uint64_t torn_first = UINT64_MAX, torn_last; /* slots to set anew at the end of this change; none: first > last */

/* ---- its shape --------------------------------------------------------------------------------------------------------------------------------- */

static size_t bytes_for(size_t leaves) {
    size_t bytes = UVAS_GUIDE_BYTES_LEAST;
    while (bytes < UVAS_GUIDE_BYTES_MOST && uvas_guide_capacity(bytes) < SLOTS_PER_LEAF * leaves) {
        bytes *= 2;
    }
    return bytes;
}

static void lay(struct uvas_guide *guide, uintptr_t low, uintptr_t high) {
    size_t capacity = uvas_guide_capacity(guide->bytes);
    uint64_t shift = SHIFT_LEAST;
    assert(low < high);
    for (size_t i = 0; i < capacity; i++) {
        uvas_guide_set(guide, i, 0, &uvas_guide_nothing);
    }
    while (((high - 1) >> shift) - (low >> shift) + 2 + 2 * SLACK_MOST > capacity) {
        shift++;
    }
    uintptr_t slack = (high - low) / SLACK_PART;
    slack = slack >> shift > SLACK_MOST ? SLACK_MOST << shift : slack;
    low = low > slack ? low - slack : 0;
    high += slack;
    __atomic_store_n(&guide->last, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->shift, shift, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->origin, low >> shift << shift, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->last, ((high - 1) >> shift) - (low >> shift) + 1, __ATOMIC_RELAXED);
}

static void window(uintptr_t *low, uintptr_t *high, uintptr_t first, uintptr_t last) {
    uintptr_t middle = last - first;
    if ((*high - *low) / FAR_APART <= middle) {
        return;
    }
    *low = first - *low > middle ? first - middle : *low;
    *high = *high - last > middle ? last + middle : *high;
}

/* ---- what belongs into it ---------------------------------------------------------------------------------------------------------------------- */

struct place { /* the inner node right above the leaves whose fences hold an address, or NULL: the root is a leaf or nothing */
    struct uvas_inner *inner;
    uintptr_t low, high; /* its fences */
};

static struct place place_of(uintptr_t address) {
    struct place place = {NULL, 0, UVAS_NO_KEY};
    for (struct uvas_node *node = uvas_tree_follow(&uvas_book.root); node && node->kind == UVAS_INNER;) {
        place.inner = uvas_as_inner(node);
        size_t i = uvas_inner_rank(place.inner, address);
        node = uvas_tree_follow(&place.inner->child[i]);
        if (node->kind == UVAS_INNER) {
            place.low = i > 0 ? place.inner->key[i - 1] : place.low;
            place.high = i + 1 < UVAS_INNER_CHILDREN && place.inner->key[i] != UVAS_NO_KEY ? place.inner->key[i] : place.high;
        }
    }
    return place;
}

/* What belongs into a slot. */
static struct uvas_guide_slot slot_of(const struct uvas_guide *in, uint64_t slot, const struct place *place) {
    if (!place->inner) {
        return (struct uvas_guide_slot){0, &uvas_book.root};
    }
    size_t i = uvas_inner_rank(place->inner, uvas_guide_last_address(in, slot));
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

/* ---- changes of the tree ----------------------------------------------------------------------------------------------------------------------- */

static bool names_cell_of(const struct uvas_guide_slot *slot, const struct uvas_inner *inner) {
    uvas_link *cell = slot->cell;
    return inner ? cell >= inner->child && cell < inner->child + UVAS_INNER_CHILDREN : cell == &uvas_book.root;
}

/* Before an inner node above leaves is replaced; NULL: before the root stops to be a leaf. */
void uvas_guide_hide(const struct uvas_inner *inner) {
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
void uvas_guide_mend(void) {
    if (torn_first <= torn_last) {
        fill_guide(guide, torn_first, torn_last);
    }
    torn_first = UINT64_MAX;
    torn_last = 0;
}

/* ---- laying it anew ---------------------------------------------------------------------------------------------------------------------------- */

/* The end below which so many eighths of them are, if all nodes were equally full. */
static uintptr_t quantile(size_t eighths) {
    size_t of = 8;
    struct uvas_node *node = uvas_tree_follow(&uvas_book.root);
    for (; node->kind == UVAS_INNER; of = 8) {
        size_t scaled = eighths * uvas_inner_count(uvas_as_inner(node));
        node = uvas_tree_follow(&uvas_as_inner(node)->child[scaled / of]);
        eighths = scaled % of;
    }
    return uvas_as_leaf(node)->entry[eighths * uvas_leaf_count(uvas_as_leaf(node)) / of].end;
}

static void lay_guide(struct uvas_guide *in) {
    uintptr_t low = 0, high = ANYWHERE;
    struct uvas_node *root = uvas_tree_follow(&uvas_book.root);
    if (root && root->kind == UVAS_INNER) {
        const struct uvas_leaf *last = uvas_edge_leaf(root, true);
        low = uvas_edge_leaf(root, false)->entry[0].base;
        high = last->entry[uvas_leaf_count(last) - 1].end;
        window(&low, &high, quantile(1), quantile(7));
    }
    lay(in, low, high);
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
        bytes_made += bytes;
        keep_guide(made);
    }
    return made != NULL;
}

/* Where the shape of the tree is no longer what the guide was laid for: lays it anew. True: the lock was dropped meanwhile. */
bool uvas_guide_renew(void) {
    if (reshaped < reshaped_enough) {
        return false;
    }
    size_t bytes = bytes_for(uvas_nodes_count().leaves);
    struct uvas_guide *old = guide, *next = old && old->bytes >= bytes ? old : kept_guide(bytes);
    if (!next && make_guide(bytes)) {
        return true;
    }
    reshaped = 0;
    reshaped_enough = 1 + uvas_nodes_count().leaves / RESHAPED_PART;
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

/* ---- truth ------------------------------------------------------------------------------------------------------------------------------------- */

const char *uvas_guide_check(uintptr_t *where) {
    const char *wrong = NULL;
    for (uint64_t slot = 0; guide && slot <= guide->last && !wrong; slot++) {
        struct place place = place_of(uvas_guide_last_address(guide, slot));
        struct uvas_guide_slot is = slot_of(guide, slot, &place);
        bool tracked = !place.inner || (place.inner->first_slot <= slot && slot <= place.inner->last_slot);
        *where = uvas_guide_last_address(guide, slot);
        wrong = guide->slot[slot].cell != is.cell || guide->slot[slot].fence != is.fence ? "the guide misleads" : NULL;
        wrong = !tracked ? "a cell would not be hidden from the guide" : wrong;
    }
    return wrong;
}

size_t uvas_guide_bytes(void) {
    return bytes_made;
}

void uvas_guide_forget(void) {
    if (guide) {
        keep_guide(guide);
    }
    guide = NULL;
    uvas_book.guide.last = 0;
    reshaped = reshaped_enough = 0;
    torn_first = UINT64_MAX;
    torn_last = 0;
}
