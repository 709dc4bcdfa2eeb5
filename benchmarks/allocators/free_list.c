/* The limit: one list of free blocks for each power of two, threaded through the blocks, over memory that is never given back; no check, no thread
 * but one. Whatever does more than this costs more. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "adapter.h"

#define ADAPTER_NAME "free lists (the limit)"
#define ADAPTER_LIBRARY ""
#define ADAPTER_PACKAGE ""
#define ADAPTER_GET "is part of this"
#define ADAPTER_BOUND
#define ADAPTER_ALONE

#define FREE_LIST_BYTES ((size_t)20 << 30)

struct free_block {
    struct free_block *next;
};

static struct free_block *free_lists[64];
static unsigned char *free_memory;
static size_t free_used;

/* The size lies in a header as in the oldest allocators, so that free knows the list. */
static void *free_list_alloc(size_t size) {
    unsigned list = 63u - (unsigned)__builtin_clzll(size + 15);
    struct free_block *block = free_lists[list];
    if (block) {
        free_lists[list] = block->next;
        return block;
    }
    size_t bytes = ((size_t)2 << list) + 16;
    if (bytes > FREE_LIST_BYTES - free_used) {
        return NULL;
    }
    uint64_t *header = (uint64_t *)(void *)(free_memory + free_used);
    free_used += bytes;
    header[1] = list;
    return header + 2;
}

static void free_list_free(void *block) {
    uint64_t list = ((uint64_t *)block)[-1];
    ((struct free_block *)block)->next = free_lists[list];
    free_lists[list] = block;
}

static void *(*volatile free_list_pointers_alloc)(size_t) = free_list_alloc; /* called through a pointer, as everybody is */
static void (*volatile free_list_pointers_free)(void *) = free_list_free;
static void *(*list_alloc)(size_t);
static void (*list_free)(void *);

static const char *adapter_open(const char *path) {
    (void)path;
    (void)adapter_load;
    list_alloc = free_list_pointers_alloc;
    list_free = free_list_pointers_free;
    free_memory = mmap(NULL, FREE_LIST_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return free_memory == MAP_FAILED ? "no memory" : NULL;
}

static inline void *adapter_alloc(size_t size) {
    return list_alloc(size);
}

static inline void adapter_free(void *block) {
    list_free(block);
}
