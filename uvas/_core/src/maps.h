/* maps.h: what is mapped in this process, asked of the kernel by PROCMAP_QUERY or, where it lacks that, read from the text of
 * /proc/self/maps. Advice only: it explains refusals and suggests candidates, it never decides. */
#ifndef UVAS_MAPS_H
#define UVAS_MAPS_H

#include "vm.h"

struct uvas_maps { /* one look; belongs to one thread */
    struct uvas_vma *list; /* a snapshot of the text, ascending; NULL: ask the kernel each time */
    size_t count;
    size_t capacity;
};

/* A look that asks the kernel, or if it cannot, starts with a snapshot. 0 or -errno: nothing can be learnt. */
int uvas_maps_open(struct uvas_maps *maps);
/* Takes a (new) snapshot: many questions are cheaper then. */
int uvas_maps_snapshot(struct uvas_maps *maps);
void uvas_maps_close(struct uvas_maps *maps);

/* The mapping that covers `address` or the next above it: 1, or 0 where there is none, or -errno. */
int uvas_maps_next(const struct uvas_maps *maps, uintptr_t address, struct uvas_vma *out);

/* Nobody is known to be in the way. (The 192 bytes for a name need no clearing on the way of every reserve.) */
static inline void uvas_no_obstacle(struct uvas_obstacle *out) {
    out->base = 0;
    out->size = 0;
    out->owner[0] = 0;
}

/* Who is in [base, base + size), as a line in the manner of /proc/self/maps, and where. 1, or 0: nobody is seen there. */
int uvas_maps_describe(uintptr_t base, size_t size, struct uvas_obstacle *out);

/* Mappings that this process has; 0 where it cannot be learnt. */
uint64_t uvas_maps_count(void);

#endif
