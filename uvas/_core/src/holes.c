/* holes.c: the free runs of one arena, by size. Up to UVAS_BINS pages a list for each number of pages, and a bitmap of the lists that are not empty;
 * beyond that a treap ordered by (bytes, base), its priorities a hash of the descriptor's address (Seidel and Aragon 1996). Bookkeeping only. */
#include <assert.h>

#include "arena.h"
#include "vm.h"

#define HASH UINT64_C(0x9E3779B97F4A7C15) /* 2^64 / golden ratio: Knuth, vol. 3, 6.4 */

static uint64_t priority(const struct uvas_run *run) {
    return (uint64_t)(uintptr_t)run * HASH;
}

static bool before(const struct uvas_run *a, const struct uvas_run *b) {
    size_t x = uvas_run_bytes(a), y = uvas_run_bytes(b);
    return x < y || (x == y && uvas_run_base(a) < uvas_run_base(b));
}

/* Splits a treap into what comes before `key` and the rest. */
static void split(struct uvas_run *root, const struct uvas_run *key, struct uvas_run **less, struct uvas_run **rest) {
    while (root) {
        if (before(root, key)) {
            *less = root;
            less = &root->right;
            root = root->right;
        } else {
            *rest = root;
            rest = &root->left;
            root = root->left;
        }
    }
    *less = *rest = NULL;
}

static void insert(struct uvas_run **at, struct uvas_run *run) {
    while (*at && priority(*at) > priority(run)) {
        at = before(*at, run) ? &(*at)->right : &(*at)->left;
    }
    split(*at, run, &run->left, &run->right);
    *at = run;
}

static void extract(struct uvas_run **at, struct uvas_run *run) {
    while (*at != run) {
        assert(*at);
        at = before(*at, run) ? &(*at)->right : &(*at)->left;
    }
    struct uvas_run *low = run->left, *high = run->right;
    while (low && high) { /* merges what hung on it */
        if (priority(low) > priority(high)) {
            *at = low;
            at = &low->right;
            low = low->right;
        } else {
            *at = high;
            at = &high->left;
            high = high->left;
        }
    }
    *at = low ? low : high;
}

static size_t pages_of(const struct uvas_run *run) {
    return uvas_run_bytes(run) / uvas_page();
}

void uvas_holes_add(struct uvas_holes *holes, struct uvas_run *run) {
    size_t pages = pages_of(run);
    holes->count++;
    holes->bytes += uvas_run_bytes(run);
    run->idle_since = 0;
    if (pages > UVAS_BINS) {
        insert(&holes->root, run);
        return;
    }
    run->previous = NULL;
    run->next = holes->bins[pages];
    if (run->next) {
        run->next->previous = run;
    }
    holes->bins[pages] = run;
    holes->filled[pages / 64] |= UINT64_C(1) << pages % 64;
}

void uvas_holes_remove(struct uvas_holes *holes, struct uvas_run *run) {
    size_t pages = pages_of(run);
    holes->count--;
    holes->bytes -= uvas_run_bytes(run);
    uvas_holes_drop_idle(holes, run);
    if (pages > UVAS_BINS) {
        extract(&holes->root, run);
        return;
    }
    if (run->next) {
        run->next->previous = run->previous;
    }
    if (run->previous) {
        run->previous->next = run->next;
    } else {
        holes->bins[pages] = run->next;
        if (!run->next) {
            holes->filled[pages / 64] &= ~(UINT64_C(1) << pages % 64);
        }
    }
}

static bool fits(const struct uvas_run *run, size_t bytes, size_t align) {
    size_t skip = -uvas_run_base(run) & (align - 1), room = uvas_run_bytes(run);
    return skip <= room && room - skip >= bytes;
}

/* The first list from `pages` on that is not empty; UVAS_BINS + 1 if none is. */
static size_t next_bin(const struct uvas_holes *holes, size_t pages) {
    for (size_t word = pages / 64; word <= UVAS_BINS / 64; word++) {
        uint64_t bits = holes->filled[word] & (word == pages / 64 ? ~UINT64_C(0) << pages % 64 : ~UINT64_C(0));
        if (bits) {
            return word * 64 + (size_t)__builtin_ctzll(bits);
        }
    }
    return UVAS_BINS + 1;
}

/* In order from the first that is large enough. Depth O(log n). */
static struct uvas_run *best_of(struct uvas_run *root, size_t bytes, size_t align) {
    if (!root) {
        return NULL;
    }
    struct uvas_run *found = NULL;
    if (uvas_run_bytes(root) >= bytes) {
        found = best_of(root->left, bytes, align);
        if (!found && fits(root, bytes, align)) {
            found = root;
        }
    }
    return found ? found : best_of(root->right, bytes, align);
}

struct uvas_run *uvas_holes_best(const struct uvas_holes *holes, size_t bytes, size_t align) {
    size_t pages = bytes / uvas_page();
    for (size_t bin = pages <= UVAS_BINS ? next_bin(holes, pages) : UVAS_BINS + 1; bin <= UVAS_BINS; bin = next_bin(holes, bin + 1)) {
        for (struct uvas_run *run = holes->bins[bin]; run; run = run->next) {
            if (fits(run, bytes, align)) {
                return run;
            }
        }
    }
    return best_of(holes->root, bytes, align);
}

struct uvas_run *uvas_holes_largest(const struct uvas_holes *holes) {
    struct uvas_run *run = holes->root;
    while (run && run->right) {
        run = run->right;
    }
    for (size_t pages = UVAS_BINS; !run && pages > 0; pages--) {
        run = holes->bins[pages];
    }
    return run;
}

void uvas_holes_note_idle(struct uvas_holes *holes, struct uvas_run *run, uint64_t now) {
    uvas_holes_drop_idle(holes, run);
    run->idle_since = now ? now : 1;
    run->idle_next = NULL;
    run->idle_previous = holes->idle_last;
    *(run->idle_previous ? &run->idle_previous->idle_next : &holes->idle_first) = run;
    holes->idle_last = run;
}

void uvas_holes_drop_idle(struct uvas_holes *holes, struct uvas_run *run) {
    if (run->idle_since) {
        *(run->idle_previous ? &run->idle_previous->idle_next : &holes->idle_first) = run->idle_next;
        *(run->idle_next ? &run->idle_next->idle_previous : &holes->idle_last) = run->idle_previous;
        run->idle_since = 0;
    }
}
