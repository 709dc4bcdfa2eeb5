/* block.h: what the files of blocks share: alloc.c, free.c, large.c. Private to them. */
#ifndef UVAS_BLOCK_H
#define UVAS_BLOCK_H

#include "arena.h"

#define UVAS_ALIGN_LEAST ((size_t)16)
#define UVAS_GUARDED_LEAST ((size_t)64 << 10) /* in an arena with guards larger blocks have pages of their own, and a guard */

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define QUICK static inline __attribute__((always_inline))
#define SLOW __attribute__((noinline)) /* kept out of the short ways, which then need no stack */

struct uvas_ask { /* what a caller wants */
    uvas_id id;
    size_t size, align;
    bool zero, wait;
};

/* -- large.c -- */

int uvas_large_alloc(struct uvas_heap *heap, const struct uvas_ask *ask, uintptr_t *out); /* outside */

enum { UVAS_GIVE_IDLE = 1, UVAS_WANTS_OUTSIDE = 2 }; /* answers that are no failures */

/* Inside. 0; -EINVAL: it was freed already; GIVE_IDLE; WANTS_OUTSIDE: the next function is to be called outside. */
int uvas_large_free(struct uvas_heap *heap, struct uvas_run *run);
void uvas_large_free_guarded(struct uvas_arena *arena, struct uvas_run *run);

/* Idle memory: whoever comes by on a slower way looks, now and then. Inside. true: somebody should see to it. */
bool uvas_idle_come_by(struct uvas_heap *heap);
/* Outside, by the heap's thread. Who may not wait leaves it to its next call that may. */
void uvas_idle_see_to(struct uvas_heap *heap, bool wait);

#endif
