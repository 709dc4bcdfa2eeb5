/* registry.h: the process-wide book of disjoint address ranges.
 *
 * Bookkeeping only: nothing here maps, unmaps or touches the memory that it describes (nodes of its own come from vm.c).
 *
 * An ordered set of half-open ranges [base, end), each with one 64-bit value. Writers hold the core's lock; readers take none.
 *
 *   structure    a B+tree keyed by *end* address, so that one descent finds the only range that can hold an address;
 *                cost O(log n) in the number of ranges, whatever their size
 *   shortcut     a table leads to the leaf, the leaf's sketch to the entry, and the entry proves itself (nodes.h, guide.h): most lookups
 *                descend nothing. What is not proven descends the tree, which alone is the truth
 *   ordering     a node is complete before the release store of the pointer that publishes it; readers descend by acquire loads.
 *                Keys of a published node never change: a change of keys makes a new node and swaps one pointer.
 *                The value of an entry may be replaced in place (one atomic store): publishing and hiding cost no copy
 *   reclamation  by the reader's own check, without registration, fences or system calls: memory of nodes is type-stable
 *                (leaf stays leaf, inner stays inner, for the life of the process) and `clock` counts publications.
 *                A node retired at clock v is rewritten only once clock >= v + UVAS_REGISTRY_WINDOW. A reader notes the clock,
 *                descends, notes it again: less than WINDOW apart, nothing that it read was rewritten; otherwise it starts over
 *   signals      lookups only load; they may run in a signal handler, also one that interrupted a writer
 *   fork         the lock is taken over fork; the child starts with an empty book (uvas_registry_forget)
 */
#ifndef UVAS_REGISTRY_H
#define UVAS_REGISTRY_H

#include <stddef.h>
#include <stdint.h>

#define UVAS_REGISTRY_WINDOW 64u /* publications for which a retired node stays as it was */

/* Set in a value: the range is claimed, but lookups do not find it (being reserved, being released, in quarantine, poisoned). */
#define UVAS_REGISTRY_HIDDEN (UINT64_C(1) << 63)

/* Set in a value: somebody else's range that uvas has been told of. The registry itself makes nothing of it. */
#define UVAS_REGISTRY_FOREIGN (UINT64_C(1) << 62)

struct uvas_entry {
    uintptr_t base;
    uintptr_t end;
    uint64_t value;
};

/* The core's one lock. It guards the book and every record of space.c; never held over a system call, a callback or a touch of user memory. */
void uvas_registry_lock(void);
void uvas_registry_unlock(void);
/* Under the lock: sleeps, without it, until the next wake (or for no reason). */
void uvas_registry_wait(void);
/* Under the lock: wakes all that wait. */
void uvas_registry_wake(void);

/* Takes the lock, with nodes enough for one insert put by (allocated before the lock is taken).
 * 0, or -ENOMEM without the lock. */
int uvas_registry_lock_for_insert(void);

/* Under the lock. 0, or -EEXIST with the lowest range that overlaps in *taken (may be NULL) and nothing changed.
 * Requires lock_for_insert, base < end. */
int uvas_registry_insert(uintptr_t base, uintptr_t end, uint64_t value, struct uvas_entry *taken);

/* Under the lock; the range is in the book. Never fails (needs no memory that is not put by). */
void uvas_registry_remove(uintptr_t base, uintptr_t end);

/* Under the lock; the range is in the book. Replaces its value in place. */
void uvas_registry_set(uintptr_t base, uintptr_t end, uint64_t value);

/* No lock, async-signal-safe. 1 with the entry that holds `address` and is not hidden, else 0. */
int uvas_registry_find(uintptr_t address, struct uvas_entry *out);

/* No lock, async-signal-safe. 1 with the lowest entry, hidden or not, that ends above `address` (covering it or next after it), else 0. */
int uvas_registry_next(uintptr_t address, struct uvas_entry *out);

/* No lock, async-signal-safe. 1 with the highest entry, hidden or not, that starts below `address` (covering it or before it), else 0. */
int uvas_registry_previous(uintptr_t address, struct uvas_entry *out);

struct uvas_registry_stats {
    size_t ranges;
    size_t depth;      /* levels, 0 when empty */
    size_t leaf_nodes; /* in the tree */
    size_t inner_nodes;
    size_t tree_bytes; /* of the nodes in the tree */
    size_t node_bytes; /* taken from the kernel, in use, retired and free */
};

/* Every invariant of the structure: order, disjointness, fill, depth, counts, fences. Under the lock. 0, or -EINVAL with what is wrong in
 * `why` (a sentence with addresses in it). O(n). */
int uvas_registry_check(char *why, size_t why_size);
void uvas_registry_stats(struct uvas_registry_stats *out); /* under the lock */

/* The child of a fork: an empty book, every node of the parent's free again; O(1) in the number of ranges. The lock is held and stays held. */
void uvas_registry_forget(void);

#endif
