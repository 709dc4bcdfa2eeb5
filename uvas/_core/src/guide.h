/* guide.h: a table that leads a lookup to the right leaf of the registry's tree without a descent.
 *
 * It divides a window of addresses into slots of one size, about two to four for each leaf. A slot names the leaf that its last address belongs to
 * and the first address that does (the fence); what lies before the fence belongs to the leaf of the slot before. A slot in which more than two leaves
 * meet misleads, and so does a leaf's neighbour for a moment: the guide only guesses. An answer counts only if an entry of the leaf proves it.
 *
 *   cell         a leaf is named by the address of the pointer to it in its parent (or by &root): a leaf that is replaced by another with the same
 *                fences changes nothing here. Cells of a parent that goes away are hidden before that is published, and set anew after: a
 *                reader finds in the guide only cells that the tree uses at that moment
 *   window       where most leaves are: if they lie far apart, from an eighth of them to the last eighth, and as much again on each side.
 *                Outside, and where leaves crowd in one slot, lookups descend the tree
 *   size         by the number of leaves, not by what they span; made anew when half of them have been split or joined since
 *   memory       type-stable: a table once made stays, to be used again; the one in use only grows
 *
 * Written under the core's lock, read by anyone.
 */
#ifndef UVAS_GUIDE_H
#define UVAS_GUIDE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define UVAS_GUIDE_BYTES_LEAST 4096u
#define UVAS_GUIDE_BYTES_MOST (4u << 20)

struct uvas_guide_slot {
    _Alignas(16) uintptr_t fence; /* a slot lies in one cache line */
    void *cell; /* hidden: &uvas_guide_nothing */
};

struct uvas_guide {
    uintptr_t origin;         /* the window's first address */
    uint64_t shift;           /* a slot is 1 << shift bytes */
    uint64_t last;            /* slots 1 to last are the window, slot 0 is what lies before it */
    size_t bytes;             /* of this table; never changes */
    struct uvas_guide *kept;  /* not in use: the next such */
    struct uvas_guide_slot slot[];
};

static inline size_t uvas_guide_capacity(size_t bytes) {
    return (bytes - sizeof(struct uvas_guide)) / sizeof(struct uvas_guide_slot);
}

/* What lookups see of the guide: a copy, next to what else they need. Read word by word while it may change: a mixture names a wrong slot, but one of
 * the table's, as tables only grow, `slot` is stored before `last` and loaded after it. */
struct uvas_guide_view {
    uint64_t last;
    uintptr_t origin;
    uint64_t shift;
    const struct uvas_guide_slot *slot;
};

static inline void uvas_guide_show(const struct uvas_guide *guide, struct uvas_guide_view *view) {
    __atomic_store_n(&view->slot, guide->slot, __ATOMIC_RELEASE);
    __atomic_store_n(&view->origin, guide->origin, __ATOMIC_RELAXED);
    __atomic_store_n(&view->shift, guide->shift, __ATOMIC_RELAXED);
    __atomic_store_n(&view->last, guide->last, __ATOMIC_RELEASE);
}

/* Whether the address lies in the window; then what leads to the leaf that probably holds it. */
static inline __attribute__((always_inline)) bool uvas_guide_cell(const struct uvas_guide_view *view, uintptr_t address, void **cell) {
    uint64_t last = __atomic_load_n(&view->last, __ATOMIC_ACQUIRE);
    uint64_t at = (address - __atomic_load_n(&view->origin, __ATOMIC_RELAXED)) >> (__atomic_load_n(&view->shift, __ATOMIC_RELAXED) & 63);
    const struct uvas_guide_slot *slot = __atomic_load_n(&view->slot, __ATOMIC_ACQUIRE) + at + 1;
    if (at >= last) {
        return false;
    }
    slot = address < __atomic_load_n(&slot->fence, __ATOMIC_RELAXED) ? slot - 1 : slot;
    *cell = __atomic_load_n(&slot->cell, __ATOMIC_ACQUIRE);
    return true;
}

static inline uintptr_t uvas_guide_last_address(const struct uvas_guide *guide, uint64_t slot) {
    uintptr_t next = guide->origin + (slot << guide->shift);
    return next > 0 ? next - 1 : 0; /* slot 0 of a window that starts at 0 */
}

/* The cell of hidden slots: it leads nowhere. */
extern uintptr_t uvas_guide_nothing;

static inline void uvas_guide_set(struct uvas_guide *guide, uint64_t slot, uintptr_t fence, void *cell) {
    __atomic_store_n(&guide->slot[slot].fence, fence, __ATOMIC_RELAXED);
    __atomic_store_n(&guide->slot[slot].cell, cell, __ATOMIC_RELEASE);
}

/* -- guide.c: under the lock -- */

struct uvas_inner;
/* Before an inner node above leaves is replaced; NULL: before the root stops to be a leaf. */
void uvas_guide_hide(const struct uvas_inner *inner);
void uvas_guide_mend(void); /* at the end of that change */
/* Where the shape of the tree is no longer what the guide was laid for: lays it anew. True: the lock was dropped meanwhile. */
bool uvas_guide_renew(void);
/* Every slot against the tree. NULL, or what is wrong, and near which address. O(slots * log n). */
const char *uvas_guide_check(uintptr_t *where);
size_t uvas_guide_bytes(void); /* of all guides ever made */
void uvas_guide_forget(void);  /* the child of a fork */

#endif
