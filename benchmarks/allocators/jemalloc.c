/* jemalloc: malloc and free by those names, and a call of its own for giving memory back. */
#include "adapter.h"

#define ADAPTER_NAME "jemalloc"
#define ADAPTER_LIBRARY "libjemalloc.so.2"
#define ADAPTER_PACKAGE ""
#define ADAPTER_GET "apt install libjemalloc2"
#define ADAPTER_USABLE
#define ADAPTER_ALIGNED
#define ADAPTER_TRIM

static void *(*jemalloc_alloc)(size_t), *(*jemalloc_aligned)(size_t, size_t);
static void (*jemalloc_free)(void *);
static size_t (*jemalloc_usable)(void *);
static int (*jemalloc_control)(const char *, void *, size_t *, void *, size_t);

static const char *adapter_open(const char *path) {
    const char *missing = adapter_load(path);
    ADAPTER_SYMBOL(jemalloc_alloc, "malloc");
    ADAPTER_SYMBOL(jemalloc_free, "free");
    ADAPTER_SYMBOL(jemalloc_usable, "malloc_usable_size");
    ADAPTER_SYMBOL(jemalloc_aligned, "aligned_alloc");
    ADAPTER_SYMBOL(jemalloc_control, "mallctl");
    return missing;
}

static inline void *adapter_alloc(size_t size) {
    return jemalloc_alloc(size);
}

static inline void adapter_free(void *block) {
    jemalloc_free(block);
}

static size_t adapter_usable(void *block) {
    return jemalloc_usable(block);
}

static void *adapter_aligned(size_t align, size_t size) {
    return jemalloc_aligned(align, size);
}

static void adapter_trim(void) {
    (void)jemalloc_control("thread.tcache.flush", NULL, NULL, NULL, 0);
    (void)jemalloc_control("arena.4096.purge", NULL, NULL, NULL, 0); /* MALLCTL_ARENAS_ALL */
}
