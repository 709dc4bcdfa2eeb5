/* uvas: an arena that grows in a space of its own, by the calls of uvas.h; freeing includes its check of the address. */
#include <uvas.h>

#include "adapter.h"

#define ADAPTER_NAME "uvas"
#define ADAPTER_LIBRARY "libuvas.so"
#define ADAPTER_PACKAGE "uvas"
#define ADAPTER_GET "pip install ."
#define ADAPTER_USABLE
#define ADAPTER_ALIGNED
#define ADAPTER_TRIM
#define ADAPTER_HOLES

static uvas_id arena;
static __typeof__(uvas_alloc) *arena_alloc;
static __typeof__(uvas_free) *arena_free;
static __typeof__(uvas_allocation_size) *arena_size;
static __typeof__(uvas_arena_trim) *arena_trim;
static __typeof__(uvas_arena_stats) *arena_stats;

static const char *adapter_open(const char *path) {
    const char *missing = adapter_load(path);
    __typeof__(uvas_space_open) *space_open;
    __typeof__(uvas_arena_open) *arena_open;
    ADAPTER_SYMBOL(space_open, "uvas_space_open");
    ADAPTER_SYMBOL(arena_open, "uvas_arena_open");
    ADAPTER_SYMBOL(arena_alloc, "uvas_alloc");
    ADAPTER_SYMBOL(arena_free, "uvas_free");
    ADAPTER_SYMBOL(arena_size, "uvas_allocation_size");
    ADAPTER_SYMBOL(arena_trim, "uvas_arena_trim");
    ADAPTER_SYMBOL(arena_stats, "uvas_arena_stats");
    struct uvas_arena_options options = {.name = "bench"};
    if (!missing && (space_open(NULL, &options.space) || arena_open(&options, &arena))) {
        missing = "no arena could be opened";
    }
    return missing;
}

static inline void *adapter_alloc(size_t size) {
    uintptr_t base;
    return arena_alloc(arena, size, 0, &base) == 0 ? (void *)base : NULL;
}

static inline void adapter_free(void *block) {
    BENCH_NEED(arena_free(arena, (uintptr_t)block) == 0);
}

static size_t adapter_usable(void *block) {
    size_t size = 0;
    (void)arena_size(arena, (uintptr_t)block, &size);
    return size;
}

static void *adapter_aligned(size_t align, size_t size) {
    uintptr_t base;
    return arena_alloc(arena, size, align, &base) == 0 ? (void *)base : NULL;
}

static void adapter_trim(void) {
    (void)arena_trim(arena, NULL);
}

static void adapter_holes(uint64_t *bytes, uint64_t *largest) {
    struct uvas_arena_stats stats;
    BENCH_NEED(arena_stats(arena, &stats) == 0);
    *bytes = stats.hole_bytes;
    *largest = stats.largest_hole;
}
